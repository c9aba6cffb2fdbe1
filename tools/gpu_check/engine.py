"""The engine, end to end, on Llama-3-8B with random weights made on the device.

What a step must read bounds decoding: the weights but for the embedding, of which it reads a row
a token. Fractions are of the copy bandwidth that this run measured; the KV cache, which a step
reads too, is left out of the ceiling, so a large batch cannot reach it.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters import parse_config
from converters.errors import read_object
from tools.gpu_check.job import Job, device_here, progress, record
from tools.gpu_check.measure import nbytes
from tools.gpu_check.starts import model_file
from xlinfer import compile
from xlinfer.config import ModelConfig
from xlinfer.engine.engine import Engine
from xlinfer.models.transformer import Transformer
from xlinfer.quantize import quantize_model
from xlinfer.request import Request, SamplingParams


class Way(NamedTuple):
    quantization: str | None = None
    options: Mapping[str, Any] = {}  # of XLA's compiler, over those that xlinfer sets for GPUs


GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL"
ENGINES = {
    "bf16": Way(),
    "w4a16": Way("int4"),
    "fp8": Way("fp8"),
    # What xlinfer's options should be is to be read from these (docs/LOG.md): all layers as one
    # CUDA graph; a larger store of graphs for those of each layer; none; GEMMs that XLA has timed.
    "bf16_one_graph": Way(
        options={
            "xla_gpu_enable_command_buffer": f"{GRAPHS},WHILE",
            "xla_gpu_command_buffer_unroll_loops": True,
            "xla_cmd_buffer_trace_cache_size": 256,
        }
    ),
    "bf16_stored_graphs": Way(options={"xla_cmd_buffer_trace_cache_size": 256}),
    "bf16_no_graphs": Way(options={"xla_gpu_graph_min_graph_size": 10**6}),
    "bf16_autotuned": Way(
        options={"xla_gpu_enable_triton_gemm": True, "xla_gpu_autotune_level": 4}
    ),
}


def main(job: Job) -> None:
    """The engines named in the place of ops. Each needs a process of its own: the options are
    that process's."""
    for name in job.ops:
        own = compile.COMPILER_OPTIONS
        compile.COMPILER_OPTIONS = {**own, "cuda": {**own["cuda"], **ENGINES[name].options}}
        record(quantization=name, **run(job, name))


def run(job: Job, name: str) -> dict[str, Any]:
    cfg = model_config(job.dry_run)
    batches = (1, 4) if job.dry_run else (1, 32, 128)
    prompt, answer = (8, 24) if job.dry_run else (128, 256)
    long, prompts = (64, 2) if job.dry_run else (2048, 16)
    started = time.monotonic()
    model = build(cfg, ENGINES[name].quantization, job)
    params = jax.block_until_ready(nnx.state(model))
    read_bytes = nbytes(params) - nbytes(model.embed_VD.get_value())
    found: dict[str, Any] = {
        "model": "a tiny Llama" if job.dry_run else "Llama-3-8B, random weights",
        "weight_bytes": nbytes(params), "read_bytes_of_a_step": read_bytes,
        "build_s": time.monotonic() - started,
    }  # fmt: skip
    progress(f"engine {name}: {nbytes(params) / 1e9:.2f} GB of weights")
    started = time.monotonic()
    engine = Engine(
        model, max_model_len=2 * long, max_num_seqs=batches[-1],
        max_num_batched_tokens=max(long, batches[-1]), enable_prefix_caching=False,
    )  # fmt: skip
    found |= {"compile_s": time.monotonic() - started, "attention_impl": engine.attention_impl}
    progress(f"engine {name}: compiled in {found['compile_s']:.0f} s")
    record(quantization=name, **found)
    decode(engine, 1, prompt, answer)  # the first touches all memory
    copy, rate = (job.ceilings.get(key) for key in ("copy_GB_per_s", "bf16_TFLOP_per_s"))
    for streams in batches:
        tokens = decode(engine, streams, prompt, answer)
        found[f"decode_{streams}_tokens_per_s"] = tokens
        if copy:
            found[f"decode_{streams}_of_bandwidth"] = tokens / streams * read_bytes / copy / 1e9
        progress(f"engine {name}: {streams} streams, {tokens:.1f} tokens/s")
        record(quantization=name, **found)
    tokens = prefill(engine, prompts, long)
    found[f"prefill_{long}_tokens_per_s"] = tokens
    if rate:
        found[f"prefill_{long}_of_bf16_rate"] = tokens * flops_of_a_token(cfg) / rate / 1e12
    progress(f"engine {name}: prefill of {prompts} x {long}, {tokens:.0f} tokens/s")
    facts = jax.devices()[0].memory_stats() or {}
    return found | {"peak_bytes_in_use": facts.get("peak_bytes_in_use")}


def model_config(dry_run: bool) -> ModelConfig:
    file = model_file(dry_run)
    return parse_config(file, read_object(file))


def dtype_of(job: Job) -> Any:
    return jnp.float32 if job.dry_run else jnp.bfloat16


def build(cfg: ModelConfig, quantization: str | None, job: Job) -> Transformer:
    """The model, made on the device; quantized there where asked."""
    dtype, device = dtype_of(job), device_here(job.dry_run)
    make = lambda: Transformer(cfg, dtype=dtype, device=device, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    filled = []
    for i, (path, param) in enumerate(nnx.to_flat_state(state)):
        norm, shape = path[-1] == "scale_D", param.get_value().shape
        numbers = jnp.ones(shape, dtype) if norm else _numbers(jax.random.key(i), shape, dtype)
        filled.append((path, param.replace(numbers)))
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    if quantization is not None:
        quantize_model(model, quantization, device)
    return model


@partial(jax.jit, static_argnums=(1, 2))
def _numbers(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(0.02, dtype)


def flops_of_a_token(cfg: ModelConfig) -> int:
    """Of the layers' products; attention, and the head, which a prompt needs once, left out."""
    heads = 2 * cfg.num_heads + 2 * cfg.num_kv_heads  # q, o, k, v
    layer = cfg.hidden_size * (heads * cfg.head_dim + 3 * cfg.intermediate_size)
    return 2 * cfg.num_layers * layer


def decode(engine: Engine, streams: int, prompt: int, answer: int) -> float:
    """Tokens per second from when every stream has its first token until all are done."""
    submit(engine, streams, prompt, answer)
    started, tokens, begun = None, 0, set()
    while engine.has_work:
        outputs = engine.step()
        if started is not None:
            tokens += sum(len(out.token_ids) for out in outputs)
        begun |= {out.request_id for out in outputs if out.token_ids}
        if started is None and len(begun) == streams:
            started = time.perf_counter()
    assert started is not None and tokens > 0
    return tokens / (time.perf_counter() - started)


def prefill(engine: Engine, prompts: int, length: int) -> float:
    """Prompt tokens per second, of prompts that arrive at once and ask for one token each."""
    submit(engine, prompts, length, 1)
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return prompts * length / (time.perf_counter() - started)


def submit(engine: Engine, streams: int, prompt: int, answer: int) -> None:
    rng = np.random.default_rng()
    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    for i in range(streams):
        tokens = tuple(rng.integers(0, engine.vocab_size, prompt).tolist())
        engine.add_request(Request(request_id=str(i), prompt_token_ids=tokens, sampling=params))
