"""What a deployment's devices read and compute: its own parameters, counted for the roofline."""

import math
import re

import jax
import jax.numpy as jnp

from xlinfer.config import ModelConfig
from xlinfer.deployment import Deployment, Facts, bytes_on_one
from xlinfer.mesh import split, ways
from xlinfer.plan.collectives import Collective, Layers, collectives
from xlinfer.plan.roofline import Rates, Work
from xlinfer.target import Chip

EMBEDDING, HEAD = "embed_VD", "head_DV"
# Of the first a step reads its tokens' rows, of the second attention those of distances; the others
# run where a prompt is read, once: an encoder, and what the decoder's layers make of its output.
UNREAD = re.compile(rf"({EMBEDDING}|.*positions_MD|.*distance_BN|encoder\..*|.*\.cross\.[kv]_.*)")
EXPERTS = re.compile(r"\.(gate_up_EID|down_EDI)\b")
NO_MATRIX = re.compile(r"(bias|scale)")  # of a product: those of norms and QTensors


def work_of(deployment: Deployment, config: ModelConfig) -> Work:
    mesh = deployment.programs.mesh
    n, own = ways(mesh, "heads"), ways(mesh, "experts")
    itemsize = jnp.dtype(deployment.dtype).itemsize
    layer_bytes = layer_flops = expert_bytes = expert_numbers = 0
    head_bytes = head_flops = 0
    for path, x in zip(deployment.paths, deployment.params, strict=True):
        size, numbers = bytes_on_one(x), _numbers(x)
        if path == HEAD or (path == EMBEDDING and config.tie_word_embeddings):
            head_bytes, head_flops = size, 2 * numbers
        elif UNREAD.fullmatch(path):
            continue
        elif EXPERTS.search(path):
            expert_bytes += size
            expert_numbers += 0 if NO_MATRIX.search(path) else numbers
        else:
            layer_bytes += size
            is_matrix = x.ndim >= 3 and not NO_MATRIX.search(path)
            layer_flops += 2 * numbers if is_matrix else 0
    moe, facts = config.moe, deployment.facts
    experts = 0 if moe is None else moe.num_experts
    crosses = 2 if facts.has_encoder else 1  # attentions of a layer: to a prompt as long, too
    return Work(
        devices=n,
        parts=ways(mesh, "tokens"),
        layer_bytes=layer_bytes,
        head_bytes=head_bytes,
        layer_flops=layer_flops,
        head_flops=head_flops,
        num_experts=experts,
        expert_devices=own,
        experts_per_token=0 if moe is None else moe.num_experts_per_tok,
        expert_bytes=expert_bytes * own // experts if experts else 0,
        expert_flops=2 * expert_numbers * own // experts if experts else 0,
        windows=config.windows,
        attention_chunk_sizes=config.attention_chunk_sizes,
        kv_bytes=crosses
        * (deployment.memory.page_bytes / deployment.spec.page_size / facts.num_layers),
        pair_flops=crosses * _pair_flops(facts) // n,
        hidden_bytes=config.hidden_size * itemsize,
        collectives=collectives_of(deployment, config),
        vocab_size=facts.vocab_size // (n if split(mesh, "vocab", facts.vocab_size) else 1),
    )


def collectives_of(deployment: Deployment, config: ModelConfig) -> tuple[Collective, ...]:
    """Of a step of `forward` or `decode`."""
    mesh, facts = deployment.programs.mesh, deployment.facts
    itemsize, n = jnp.dtype(deployment.dtype).itemsize, ways(mesh, "heads")
    if (latents := facts.latents) is not None:
        kept = (latents.latent_dim, latents.rope_dim)
    else:
        kept = (facts.num_kv_heads // n * facts.head_dim,) * 2
    experts = sum(kind.experts for kind in config.kinds)
    # The sums of the experts and of the one that all tokens pass are one, but for a gate behind it.
    shared = config.moe is not None and config.moe.shared_gate
    return collectives(
        Layers(
            attention=facts.num_layers,
            cross_attention=facts.num_layers if facts.has_encoder else 0,
            mlp=facts.num_layers - experts,
            experts=experts,
            gated_experts=experts if shared else 0,
            norms_of_heads=2 if config.qk_norm == "all" else 0,
            hidden_bytes=config.hidden_size * itemsize,
            kept_bytes=tuple(size * itemsize for size in kept),
        ),
        devices=n,
        parts=ways(mesh, "tokens"),
        embedding_is_split=split(mesh, "vocab", facts.vocab_size) is not None,
    )


def _pair_flops(facts: Facts) -> int:
    """q·k and p·v of all heads. A latent is key and value at once, and its rope part only key."""
    if (latents := facts.latents) is not None:
        return facts.num_heads * (4 * latents.latent_dim + 2 * latents.rope_dim)
    return facts.num_heads * 4 * facts.head_dim


def rates_of(deployment: Deployment, chip: Chip) -> Rates:
    """Weights in int4 and int8 are widened to the activations' dtype before they are multiplied;
    fp8 is multiplied as it is where the chip can."""
    activations = jnp.dtype(deployment.dtype).name
    known = "bfloat16" if activations == "float16" else activations
    is_fp8 = any(x.dtype.name == "float8_e4m3fn" for x in deployment.params)
    attention = chip.flops[known]
    products = chip.flops.get("float8_e4m3fn", attention) if is_fp8 else attention
    return Rates(memory=chip.bandwidth, products=products, attention=attention, link=chip.link)


def _numbers(x: jax.ShapeDtypeStruct) -> int:
    """Of a placed array, how many lie on one device."""
    return math.prod(x.sharding.shard_shape(x.shape))  # type: ignore[union-attr]
