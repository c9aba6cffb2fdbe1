"""`python -m tools.aot.programs PROGRAM BUCKET QUANTIZATION DEVICE`: the engine's program of that
name and size for Llama 3 8B, with the kernels that the engine would choose, or the model's own
forward of one row, `call`; JSON as the last line.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from converters.families import parse_config
from pallas_kernels import flash_attention
from pallas_kernels.devices import DEVICES, GPUS, Device
from xlinfer.compile import options_for
from xlinfer.config import ModelConfig
from xlinfer.deployment import Job, Sizes, deploy, facts_of
from xlinfer.mesh import TENSOR
from xlinfer.quantize import quantize_model
from xlinfer.topology import described_mesh, lower
from xlinfer.weights import abstract_model

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
# name, bucket and quantization of the programs that `./run aot` compiles for every device
PROGRAMS = (
    ("decode", 8, "none"),
    ("decode", 128, "none"),
    ("forward", 2048, "none"),
    ("decode", 128, "int4"),
    ("decode", 128, "fp8"),
    ("call", 2048, "none"),
)
NUM_PAGES = 513
SIZES = Sizes(
    max_model_len=4096, max_num_seqs=128, max_num_batched_tokens=2048, page_size=64,
    num_pages=NUM_PAGES,
)  # fmt: skip
PALLAS_CALL = r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*)"'
# XLA's own GEMMs, which have poor tiles where no GPU is, and what it computes twice.
UNWANTED_ON_GPUS = r"__triton\w*gemm|%\S*remat"


def compile_program(program: str, bucket: str, quantization: str, device_name: str) -> dict:
    """Bytes, seconds and Pallas kernels, and the bounds on them: `cache_bytes` must be aliased,
    temporaries stay below `most_temp_bytes`, which has no room for copies of weights."""
    device = DEVICES[device_name]
    # 16 GB do not hold the weights in bf16.
    shards = 4 if device.name == "v5e" and quantization == "none" else 1
    mesh = described_mesh(device, {TENSOR: shards})
    config = parse_config(Path("config.json"), LLAMA_3_8B)
    model = abstract_model(config, jnp.bfloat16, mesh, device)
    if quantization != "none":
        quantize_model(model, quantization, device)
    graph, state = nnx.split(model)
    params, tree = jax.tree.flatten(state)
    if program == "call":
        call = lambda params, token_BT: nnx.merge(graph, jax.tree.unflatten(tree, params))(token_BT)
        whole = NamedSharding(mesh, PartitionSpec())
        row = jax.ShapeDtypeStruct((1, int(bucket)), jnp.int32, sharding=whole)
        head = config.head_dim
        return report(Job(call, (tuple(params), row), (), None), device, mesh) | {
            "attention_impl": flash_attention.choose(device, H=head, V=head, dtype=jnp.bfloat16),
            "cache_bytes": 0,
            "most_temp_bytes": most_temp_bytes(program, int(bucket), 1, config, device),
        }
    deployment = deploy(
        graph, state, facts_of(model), mesh=mesh, device=device, device_bytes=0,
        sizes=SIZES, described=True,
    )  # fmt: skip
    compiled = report(deployment.jobs()[program, int(bucket)], device, mesh)
    rows = deployment.plan.max_num_seqs
    return compiled | {
        "attention_impl": deployment.spec.impl,
        "cache_bytes": NUM_PAGES * deployment.memory.page_bytes,
        "most_temp_bytes": most_temp_bytes(program, int(bucket), rows, config, device),
    }


def most_temp_bytes(
    program: str, bucket: int, rows: int, config: ModelConfig, device: Device
) -> int:
    """The sampler's state, updated out of place, and several float32 logits of every row; or a
    prompt's hidden states, several MLPs wide. Of a call three, gate, up and their product: the
    probabilities of a layer, [N, T, T] in bf16, would be half as much again."""
    if program == "decode":
        logits = 9 if device.name in ("v5p", "tpu7x") else 6  # float32, as XLA schedules them
        return 4 * config.vocab_size * (2 * (rows + 1) + logits * bucket)
    if program == "call":
        return 2 * bucket * 3 * config.intermediate_size
    return 2 * bucket * (8 * config.intermediate_size + 8 * config.hidden_size)


def report(job: Job, device: Device, mesh: Any) -> dict:
    started = time.perf_counter()
    lowered = lower(
        job.run, job.args, device, mesh, donate_argnums=job.donated, out_shardings=job.placed
    )
    compiled = lowered.compile(options_for(device))
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    return {
        "seconds": time.perf_counter() - started,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "kernels": len(re.findall(PALLAS_CALL, hlo)),
        "unwanted": sorted(set(re.findall(UNWANTED_ON_GPUS, hlo))) if device in GPUS else [],
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(compile_program(*sys.argv[1:])))
