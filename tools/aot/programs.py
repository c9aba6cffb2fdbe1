"""`python -m tools.aot.programs PROGRAM BUCKET QUANTIZATION DEVICE`: the engine's program of that
name and size for Llama 3 8B, with the kernels that the engine would choose; JSON as the last line.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from converters.families import parse_config
from pallas_kernels.devices import DEVICES, Device
from pallas_kernels.paged_attention import choose
from xlinfer.compile import jobs_of
from xlinfer.config import ModelConfig
from xlinfer.kvcache import CacheSpec
from xlinfer.models import Transformer
from xlinfer.plan import make_plan
from xlinfer.programs import Programs
from xlinfer.quant import quantize_model
from xlinfer.topology import described_mesh, lower

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
)
PAGE_SIZE, NUM_PAGES = 64, 513


def compile_program(program: str, bucket: str, quantization: str, device_name: str) -> dict:
    """Bytes and seconds, and the bounds on them: `cache_bytes` must be aliased, and temporaries
    stay below `most_temp_bytes`, which has no room for copies of weights."""
    device = DEVICES[device_name]
    mesh = described_mesh(device)
    config = parse_config(Path("config.json"), LLAMA_3_8B)
    unroll = device.platform == "cuda"
    model = nnx.eval_shape(
        lambda: Transformer(config, dtype=jnp.bfloat16, unroll=unroll, rngs=nnx.Rngs(0))
    )
    if quantization != "none":
        quantize_model(model, quantization, device)
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    impl = choose(device, page_size=PAGE_SIZE, head_dim=config.head_dim, dtype=jnp.bfloat16)
    plan = make_plan(
        max_model_len=4096, max_num_seqs=128, max_num_batched_tokens=2048, page_size=PAGE_SIZE,
        num_pages=NUM_PAGES, decode_window=32, max_logprobs=20, deterministic=False,
        bucket_ratio=2,
    )  # fmt: skip
    spec = CacheSpec(
        num_layers=config.num_layers, num_pages=NUM_PAGES, num_kv_heads=config.num_kv_heads,
        page_size=PAGE_SIZE, head_dim=config.head_dim, dtype=jnp.bfloat16, impl=impl,
    )  # fmt: skip
    programs = Programs(
        graph=graph, tree=tree, plan=plan, mesh=mesh, device=device, attention_impl=impl
    )
    params = tuple(place(x) for x in leaves)
    jobs = jobs_of(programs, params, config.vocab_size, spec.abstract(mesh))
    job = jobs[program, int(bucket)]
    return report(job, device, mesh) | {
        "attention_impl": impl,
        "cache_bytes": NUM_PAGES * spec.page_bytes_per_device(mesh),
        "most_temp_bytes": most_temp_bytes(program, int(bucket), plan.max_num_seqs, config),
    }


def most_temp_bytes(program: str, bucket: int, rows: int, config: ModelConfig) -> int:
    """The sampler's state, updated out of place, and several float32 logits of every row; or a
    prompt's hidden states, several MLPs wide."""
    if program == "decode":
        return 4 * config.vocab_size * (2 * (rows + 1) + 6 * bucket)
    return 2 * bucket * (8 * config.intermediate_size + 8 * config.hidden_size)


def report(job: Any, device: Device, mesh: Any) -> dict:
    started = time.perf_counter()
    lowered = lower(
        job.run, job.args, device, mesh, donate_argnums=job.donated, out_shardings=job.placed
    )
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return {
        "seconds": time.perf_counter() - started,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(compile_program(*sys.argv[1:])))
