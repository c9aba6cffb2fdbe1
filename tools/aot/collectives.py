"""`python -m tools.aot.collectives CASE`: a small model, compiled for a TPU slice; what
its devices exchange in each layer and in each step, as planned and as compiled. JSON, as the last
line.
"""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import jax

from xlinfer.commands.costs import collectives_of
from xlinfer.compile import lower_job, options_for
from xlinfer.deployment import Deployment, Sizes
from xlinfer.plan.collectives import Collective
from xlinfer.setup import Setup, deployment_for, model_config


class Exchange(NamedTuple):
    """One array that devices exchange."""

    kind: str
    bytes: int  # of the result, on each device
    devices: int
    loops: int  # that it is in


class Case(NamedTuple):
    model: str  # of MODELS
    target: str
    tensor: int
    expert: int = 1
    sequence: int = 1
    quantization: str | None = None


_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
    "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 8192,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
# Layers as they are published, but fewer and narrower.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mixtral": _LLAMA | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8,
        "num_experts_per_tok": 2, "rope_theta": 1e6,
    },
    "deepseek": _LLAMA | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "num_key_value_heads": 16, "head_dim": 64, "q_lora_rank": 256, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "first_k_dense_replace": 0, "moe_intermediate_size": 512, "n_routed_experts": 16,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "moe_layer_freq": 1, "attention_bias": False,
        "rope_scaling": None, "rope_theta": 10000.0,
    },
}  # fmt: skip
CASES: Mapping[str, Case] = {
    "dense": Case("llama", "v6e-8", 8),
    "dense_int4": Case("llama", "v6e-8", 8, quantization="int4"),
    "dense_pod": Case("llama", "v5p-16", 16),
    "experts": Case("mixtral", "v6e-8", 8, expert=8),
    "experts_shared": Case("mixtral", "v5p-16", 16, expert=8),
    "experts_int4": Case("mixtral", "v5p-16", 16, expert=8, quantization="int4"),
    "latents": Case("deepseek", "v6e-8", 8, expert=8),
    "parts": Case("llama", "v6e-8", 4, sequence=2),
    "parts_experts": Case("mixtral", "v5p-16", 8, expert=4, sequence=2),
    "parts_latents": Case("deepseek", "v6e-8", 4, expert=4, sequence=2),
}
SIZES = Sizes(max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=256, num_pages=300)


def deployed(case: Case) -> tuple[Deployment, Setup]:
    on_cpu = case.target.startswith("cpu")
    setup = Setup(
        config=MODELS[case.model], target=case.target, tensor_parallel_size=case.tensor,
        expert_parallel_size=case.expert, sequence_parallel_size=case.sequence,
        dtype="float32" if on_cpu else "bfloat16", quantization=case.quantization,
        matmul_impl=None, sizes=SIZES,
    )  # fmt: skip
    return deployment_for(setup), setup


def compiled(deployment: Deployment, program: str, bucket: int) -> str:
    lowered = lower_job(deployment.jobs()[program, bucket], deployment)
    hlo = lowered.compile(options_for(deployment.programs.device)).as_text()
    assert hlo is not None
    return hlo


def planned(deployment: Deployment, setup: Setup, tokens: int, loops: int) -> Counter[Exchange]:
    """Of a program of so many tokens whose layers, all of a kind, are in the body of `loops`."""

    def exchange(one: Collective) -> Exchange:
        inside = loops if one.layers is not None else loops - 1
        return Exchange(one.kind, one.result_bytes(tokens), one.devices, inside)

    return Counter(map(exchange, collectives_of(deployment, model_config(setup))))


COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
# Listed; so many of so many; or along axes of a mesh, whose sizes stand before.
LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
ALONG = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


def exchanges(hlo: str) -> Counter[Exchange]:
    """Every array that a program's devices exchange, but for those in a branch, which most steps do
    not take: what sampling may be asked for."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if found := COMPUTATION.match(line):
            name = found[2]
            bodies[name] = []
            entry = name if found[1] else entry
        elif name:
            bodies[name].append(line)

    def within(name: str, loops: int) -> Iterator[Exchange]:
        for line in bodies[name]:
            if found := COLLECTIVE.search(line):
                yield from (
                    Exchange(found[2], size, _devices(line), loops)
                    for size in _results(found[1], found[2], bool(found[3]))
                )
            elif " conditional(" not in line and (called := CALLED.search(line)):
                yield from within(called[1], loops + (" while(" in line))

    return Counter(within(entry, 0))


def _results(shape: str, kind: str, starts: bool) -> list[int]:
    """Bytes of each result. What starts an exchange has its operands before its results, but for
    a sum's."""
    sizes = []
    for dtype, dims in ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        sizes.append(prod(map(int, filter(None, dims.split(",")))) * bits // 8)
    if not starts or kind == "all-reduce":
        return sizes
    return sizes[1:2] if kind == "collective-permute" else sizes[len(sizes) // 2 :]


def _devices(line: str) -> int:
    if found := LISTED.search(line):
        return found[1].count(",") + 1
    if found := COUNTED.search(line):
        return int(found[1])
    if found := ALONG.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    raise ValueError(f"no devices are named in {line.strip()[:200]}")


def report(case: str) -> dict[str, Any]:
    started = time.perf_counter()
    deployment, setup = deployed(CASES[case])
    tokens = deployment.plan.token_buckets[-1]
    found = exchanges(compiled(deployment, "forward", tokens))
    listed = lambda counted: sorted([*one, n] for one, n in counted.items())
    return {
        "seconds": time.perf_counter() - started,
        "planned": listed(planned(deployment, setup, tokens, 1)),
        "found": listed(found),
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps(report(sys.argv[1])))
