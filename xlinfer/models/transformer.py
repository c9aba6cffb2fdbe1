"""The decoder-only transformer: embedding, scanned layers, norm, head."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import DEVICES, Device
from xlinfer.config import ModelConfig, Rope
from xlinfer.kvcache import KV, Attend, LatentAttend, Latents
from xlinfer.mesh import AnyMesh
from xlinfer.models.block import Block
from xlinfer.models.causal_lm import causal_attend, causal_latent_attend
from xlinfer.models.parts import bias, hidden_norm, token_logits, weight
from xlinfer.models.rope import Positions, rope_angles, rope_frequencies, temperatures
from xlinfer.models.scan import scan_layers
from xlinfer.quant import apart, lookup, together
from xlinfer.stacks import Run, runs


class Transformer(nnx.Module):
    """`model(tokens[B, T]) -> logits[B, T, V]`, causal and pure: jit, vmap and grad apply, and
    forward-mode jvp where attention is no kernel.

    `layers` are stacks: every array of one has the layer as its first axis, and the forward scans
    over it, so neither compile time nor the number of arguments grows with depth. Layers that
    differ are stacked by the pattern that they repeat (see xlinfer.stacks).

    `device` is what the forward's kernels are chosen for, where the weights are to lie; what the
    CPU runs runs anywhere. `mesh` is needed where several devices share the heads or experts.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        dtype=jnp.float32,
        device: Device = DEVICES["cpu"],
        mesh: AnyMesh | None = None,
        rngs: nnx.Rngs,
    ):
        V, D, M = cfg.vocab_size, cfg.hidden_size, cfg.max_position_embeddings
        self.embed_VD = weight(rngs, dtype, ("vocab", "hidden"), V, D, is_table=True)
        if cfg.embedding_norm:
            self.embed_norm = hidden_norm(cfg, dtype)
        if cfg.learned_positions:
            self.positions_MD = weight(rngs, dtype, ("positions", "hidden"), M, D)

        def stack(layers: range) -> Block:
            @nnx.split_rngs(splits=len(layers))
            @nnx.vmap(in_axes=0, out_axes=0)
            def stacked(rngs: nnx.Rngs) -> Block:
                kind = cfg.kinds[layers.start]
                return Block(cfg, kind, dtype=dtype, device=device, mesh=mesh, rngs=rngs)

            return stacked(rngs)

        self.runs = runs(cfg.kinds)
        self.layers = nnx.List([stack(layers) for run in self.runs for layers in run.stacks])
        self.norm = hidden_norm(cfg, dtype)
        if not cfg.tie_word_embeddings:
            self.head_DV = weight(rngs, dtype, ("hidden", "vocab"), D, V)
        if cfg.head_bias:
            self.head_bias_V = bias(dtype, ("vocab",), V)
        self.cfg, self.device, self.mesh = cfg, device, mesh
        self.vocab_size, self.num_layers = cfg.vocab_size, cfg.num_layers
        self.num_heads, self.num_kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.head_dim, self.kv_scales = cfg.head_dim, cfg.kv_scales
        self.max_position_embeddings = cfg.max_position_embeddings
        self.latents = None
        if cfg.mla is not None:
            self.latents = Latents(latent_dim=cfg.mla.latent_dim, rope_dim=cfg.rotary_dim)
        self.token_width = _token_width(cfg)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        over_whole = causal_attend if self.latents is None else causal_latent_attend
        attend = over_whole(self.device, self.mesh)
        x_BTD, _ = self.hidden(tokens_BT, pos_BT, attend, None, context_len=tokens_BT.shape[1])
        return self.logits(x_BTD)

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        pos_BT: Int[Array, "B T"],
        attend: Attend | LatentAttend,
        kv: KV,
        *,
        context_len: int,
    ) -> tuple[Float[Array, "B T D"], KV]:
        """See CausalLM.hidden."""
        x_BTD = lookup(self.embed_VD, tokens_BT).astype(self.norm.scale_D[...].dtype)
        if self.cfg.embedding_norm:
            x_BTD = self.embed_norm(x_BTD)
        if self.cfg.embedding_multiplier != 1.0:
            x_BTD *= self.cfg.embedding_multiplier
        if self.cfg.learned_positions:
            x_BTD += self.positions_MD[...][pos_BT]
        positions = {
            rope: self._positions(rope, pos_BT, context_len)
            for rope in dict.fromkeys(self.cfg.ropes)
        }
        stacks, carry = iter(self.layers), (x_BTD, kv)
        for run in self.runs:
            blocks = list(itertools.islice(stacks, run.period))
            carry = _scan(run, blocks, carry, positions, attend)
        x_BTD, kv = carry
        return self.norm(x_BTD), kv

    def _positions(
        self, rope: Rope | None, pos_BT: Int[Array, "B T"], context_len: int
    ) -> Positions:
        """Once for all layers of that rope."""
        if rope is None:
            tuning = self.cfg.temperature_tuning
            return Positions(None, None if tuning is None else temperatures(tuning, pos_BT))
        freq_h, scale = rope_frequencies(rope, self.cfg.rotary_dim, context_len)
        return Positions(rope_angles(freq_h, scale, pos_BT), None)

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 scores of the next token."""
        return token_logits(self, x_BTD)


def _scan(
    run: Run,
    blocks: list[Block],
    carry: Any,
    positions: Mapping[Rope | None, Positions],
    attend: Attend | LatentAttend,
) -> Any:
    """x and the cache after the layers of `run`, whose stacks are `blocks`."""
    graphs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    sliced, whole = zip(*map(apart, states), strict=True)

    def period(carry, xs):
        (x_BTD, kv), (weights, i) = carry, xs
        for j, one in enumerate(blocks):
            block = nnx.merge(graphs[j], together(weights[j], whole[j], i))
            layer = i * run.period + (run.first + j)
            x_BTD, kv = block(x_BTD, positions[one.kind.rope], attend, kv, layer=layer)
        return x_BTD, kv

    return scan_layers(period, carry, (sliced, jnp.arange(run.repeats)))


def _token_width(cfg: ModelConfig) -> int:
    """Numbers alive at once for each token of a forward, as XLA schedules it: gate and up, or
    those of all experts of a token with their input, or queries to latents and what they get, and
    the residual; where attention and MLP are parallel, the sum of both too."""
    D, widths = cfg.hidden_size, []
    if cfg.mla is not None:
        widths.append(cfg.num_heads * (2 * cfg.mla.latent_dim + cfg.rotary_dim))
    if any(not kind.experts for kind in cfg.kinds):
        widths.append((2 if cfg.gated_mlp else 1) * cfg.intermediate_size)
    if cfg.moe is not None and cfg.moe.layers:
        widths.append(cfg.moe.num_experts_per_tok * (3 * cfg.moe.intermediate_size + D))
    return max(widths) + (3 if cfg.parallel else 2) * D
