"""The shapes that tests, the compile gate, benchmarks and tuning all run; see
pallas_kernels/cases.py for the names. Add one here, get all four."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Work
from pallas_kernels.devices import Device, Impl
from pallas_kernels.flash_attention import (
    choose,
    cudnn,
    flash_attention,
    mosaic_gpu,
    mosaic_tpu,
)
from pallas_kernels.flash_attention.key import tuning_key as key_of
from pallas_kernels.reach import most

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))


class Case(NamedTuple):
    name: str
    B: int  # rows
    T: int  # tokens of a row
    N: int  # query heads
    K: int  # kv heads
    H: int  # head_dim of q and k
    V: int  # head_dim of v
    window: int | None = None
    attention_chunk_size: int | None = None
    traced: bool = False  # whether the window is an array
    causal: bool = True
    softcap: float | None = None
    scale: float | None = None  # None: H ** -0.5
    sinks: bool = False
    alibi: bool = False
    lengths: tuple[int, ...] | None = None
    dtype: Any = BF16
    gpu: mosaic_gpu.Tiles | None = None  # None: the kernel's own choice
    tpu: mosaic_tpu.Tiles | None = None


_Small = mosaic_tpu.Tiles(heads=1, queries=64, keys=128)

# Small, and every feature and edge.
CASES = (
    Case("gqa", 1, 260, 4, 1, 128, 128),
    Case("mha_of_64", 2, 200, 2, 2, 64, 64, dtype=F16),
    Case("short_window", 1, 300, 1, 1, 64, 64, window=70, sinks=True),
    Case("traced_window", 1, 390, 2, 1, 128, 128, window=150, traced=True, tpu=_Small),
    Case("chunked", 1, 300, 2, 1, 64, 64, attention_chunk_size=128, gpu=mosaic_gpu.Tiles(2, 64, 2),
         tpu=_Small),
    Case("wider_keys", 1, 130, 1, 1, 192, 128),
    Case("of_80", 1, 130, 1, 1, 80, 80, softcap=5.0),
    Case("of_96", 2, 200, 1, 1, 96, 96, causal=False, scale=1.0, lengths=(130, 0)),
    Case("of_256", 1, 130, 1, 1, 256, 256, alibi=True),
    Case("all_at_once", 2, 330, 2, 1, 64, 64, window=77, attention_chunk_size=200, traced=True,
         softcap=5.0, sinks=True, alibi=True, lengths=(330, 40), tpu=mosaic_tpu.Tiles(2, 64, 128)),
)  # fmt: skip

# Rarer: marked slow.
SLOW_CASES = (
    Case("one_token", 1, 1, 1, 1, 64, 64),
    Case("of_192", 1, 200, 1, 1, 192, 192, sinks=True),
    Case("wider_values", 1, 130, 1, 1, 64, 128),
    Case("narrower_values", 1, 200, 1, 1, 96, 64),
    Case("full", 1, 256, 2, 2, 128, 128, causal=False, scale=1.0),
    Case("three_warpgroups", 1, 400, 1, 1, 64, 64, gpu=mosaic_gpu.Tiles(3, 64, 2)),
    Case("few_keys", 1, 330, 1, 1, 128, 128, gpu=mosaic_gpu.Tiles(2, 64, 3),
         tpu=mosaic_tpu.Tiles(1, 256, 128)),
    Case("few_keys_window", 1, 330, 1, 1, 128, 128, window=100, lengths=(290,),
         gpu=mosaic_gpu.Tiles(2, 64, 3), tpu=mosaic_tpu.Tiles(1, 32, 128)),
    Case("odd_chunks", 1, 330, 1, 1, 64, 64, window=90, attention_chunk_size=100, traced=True,
         lengths=(290,), tpu=_Small),
    Case("long_tail", 3, 300, 1, 1, 64, 64, lengths=(300, 0, 129), tpu=_Small),
    Case("float32", 1, 200, 2, 1, 64, 64, dtype=F32, tpu=_Small),
    Case("float32_all", 2, 200, 4, 2, 128, 64, window=60, softcap=5.0, sinks=True, alibi=True,
         lengths=(200, 40), dtype=F32, tpu=mosaic_tpu.Tiles(2, 32, 128)),
)  # fmt: skip


def _model(name: str, **shape) -> tuple[Case, ...]:
    return tuple(Case(f"{name}_{T // 1024}k", B=1, T=T, **shape) for T in (2048, 8192, 16384))


MODEL_CASES = (
    *_model("llama3_8b", N=32, K=8, H=128, V=128),
    *_model("llama3_70b_tp8", N=8, K=1, H=128, V=128),
    *_model("qwen3_30b", N=32, K=4, H=128, V=128),
    *_model("gemma3_27b", N=32, K=16, H=128, V=128, window=1024, scale=168**-0.5),
    *_model("llama4_scout", N=40, K=8, H=128, V=128, attention_chunk_size=8192),
    *_model("deepseek_v3", N=128, K=128, H=192, V=128),
    *_model("gpt_oss_120b", N=64, K=8, H=64, V=64, window=128, sinks=True),
    # What is compared with cuDNN's records, and a batch of rows with tails.
    Case("mha_16k", 1, 16384, 16, 16, 128, 128),
    Case("llama3_8b_rows", 4, 4096, 32, 8, 128, 128, lengths=(4096, 4000, 2100, 17)),
    Case("gemma3_27b_traced", 1, 8192, 32, 16, 128, 128, window=1024, traced=True,
         scale=168**-0.5),
)  # fmt: skip


def impls(case: Case, device: Device) -> tuple[Impl, ...]:
    best = choose(device, H=case.H, V=case.V, dtype=case.dtype)
    return (best, "cudnn") if best == "mosaic_gpu" and not _refused(case) else (best,)


def _refused(case: Case) -> bool:
    given = lambda x: True if x else None
    return cudnn.refusal(
        H=case.H, V=case.V, window=given(case.window) if case.traced else case.window,
        attention_chunk_size=case.attention_chunk_size, softcap=case.softcap,
        sinks_N=given(case.sinks), alibi_N=given(case.alibi),
    ) is not None  # fmt: skip


def inputs(case: Case, key: jax.Array, impl: Impl) -> tuple:
    """(q, k, v, window, sinks, alibi, lengths); None where the case has none, or a constant."""
    del impl
    q, k, v, sink = jax.random.split(key, 4)
    normal = lambda key, *shape: jax.random.normal(key, (case.B, case.T, *shape), case.dtype)
    return (
        normal(q, case.N, case.H),
        normal(k, case.K, case.H),
        normal(v, case.K, case.V),
        jnp.asarray(case.window, jnp.int32) if case.traced else None,
        jax.random.normal(sink, (case.N,)) if case.sinks else None,
        0.5 ** jnp.arange(1.0, case.N + 1) if case.alibi else None,
        None if case.lengths is None else jnp.asarray(case.lengths, jnp.int32),
    )


def call(case: Case, impl: Impl, device: Device, *, interpret: Any = False, tiles=None):
    tiles = tiles or {"mosaic_gpu": case.gpu, "mosaic_tpu": case.tpu}.get(impl)

    def run(q, k, v, window, sinks, alibi, lengths):
        return flash_attention(
            q, k, v,
            window=window if case.traced else case.window,
            attention_chunk_size=case.attention_chunk_size,
            scale=case.scale or case.H**-0.5, causal=case.causal, softcap=case.softcap,
            sinks_N=sinks, alibi_N=alibi, lengths_B=lengths,
            device=device, impl=impl, interpret=interpret, tiles=tiles,
        )  # fmt: skip

    return jax.jit(run)


def tuning_key(case: Case, device: Device) -> str:
    del device
    q, _, v, window, *_ = jax.eval_shape(
        lambda key: inputs(case, key, "reference"), jax.random.key(0)
    )
    bound = most(window if case.traced else case.window, case.attention_chunk_size)
    return key_of(q, v, causal=case.causal, window=bound)


def candidates(case: Case, device: Device) -> tuple:
    """The kernel's own choice first."""
    if device.platform == "tpu":
        first = mosaic_tpu.tiles(case.B, case.T, case.N, case.K, device)
        sizes = [(q, k) for q in (128, 256, 512, 1024) for k in (256, 512, 1024, 2048)]
        others = [
            mosaic_tpu.Tiles(first.heads, q, k)
            for q, k in sizes
            if q * first.heads <= 2048 and k <= case.T and q <= case.T
        ]
    elif device.platform == "cuda":
        bound = most(case.window, case.attention_chunk_size)
        first = mosaic_gpu.tiles(case.H, case.V, device, bound)
        others = [
            choice
            for warpgroups in (2, 3)
            for keys in (64, 128)
            for stages in (2, 3, 4)
            if (choice := mosaic_gpu.Tiles(warpgroups, keys, stages))
            and mosaic_gpu.fits(choice, case.H, case.V, device)
        ]
    else:
        return ()
    return (first, *(t for t in others if t != first))


def work(case: Case) -> Work:
    lengths = case.lengths or (case.T,) * case.B
    flops = lambda window: (
        2
        * (case.H + case.V)
        * case.N
        * sum(mosaic_tpu.seen(n, case.causal, window, case.attention_chunk_size) for n in lengths)
    )
    return Work(
        flops=flops(case.window),
        bytes=case.B * case.T * case.dtype.itemsize * (case.N + case.K) * (case.H + case.V),
        most_flops=flops(None) if case.traced else None,
    )
