"""What tests, the compile gate, benchmarks and tuning run; see pallas_kernels/cases.py."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Work
from pallas_kernels.devices import Device, Impl
from pallas_kernels.grids import Grid
from pallas_kernels.int4_matmul import choose, int4_matmul
from pallas_kernels.int4_matmul import tiles as tiling
from pallas_kernels.int4_matmul.mosaic_tpu import Tiles as TpuTiles
from pallas_kernels.int4_matmul.tiles import Tiles


class Case(NamedTuple):
    name: str
    M: int
    N: int
    K: int
    group: int
    dtype: str = "bfloat16"
    scale: str = "bfloat16"
    zeros: bool = False
    grid: Grid = "int"
    layers: int | None = None  # of a stack, whose last is multiplied by
    gpu_tiles: Tiles | None = None  # instead of the kernel's own choice
    tpu_tiles: TpuTiles | None = None


F16, F32 = "float16", "float32"
# Of bitsandbytes: quantiles of a normal distribution.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Tiles of one or two compute warpgroups: the interpreter gives each a thread that blocks, and
# XLA's CPU client may have no more than four.
ONE, TWO = Tiles(16, 1, 1, 128, 1, 2, 1, 1, True), Tiles(8, 2, 1, 128, 1, 2, 1, 1, True)
SCALE_FIRST, TPU_SCALE_FIRST = (
    Tiles(40, 2, 1, 128, 1, 2, 1, 1, False),
    TpuTiles(48, 128, 128, False),
)
CASES = (
    Case("one_token", 1, 128, 256, 128, gpu_tiles=TWO),
    Case("of_a_stack", 5, 128, 256, 64, zeros=True, layers=2, gpu_tiles=TWO),
    Case("per_channel_of_a_stack", 5, 128, 128, 128, layers=3, gpu_tiles=TWO),
    Case("stages_reused", 8, 128, 384, 128, gpu_tiles=TWO),
    Case("group_64", 16, 128, 256, 64, gpu_tiles=TWO._replace(tokens=16)),
    Case("group_32_zeros", 8, 128, 128, 32, zeros=True, gpu_tiles=TWO),
    Case("per_channel", 24, 128, 256, 256, gpu_tiles=TWO._replace(tokens=24)),
    Case("per_channel_zeros", 8, 128, 256, 256, scale=F32, zeros=True, gpu_tiles=TWO),
    Case("float16_zeros", 8, 128, 128, 128, F16, F16, zeros=True, gpu_tiles=TWO),
    Case("float32_scales", 5, 128, 128, 128, scale=F32, gpu_tiles=TWO),
    Case("odd_K", 9, 64, 192, 64, gpu_tiles=ONE._replace(width=64)),
    Case(
        "scale_first_zeros", 40, 128, 256, 128,
        zeros=True, gpu_tiles=SCALE_FIRST, tpu_tiles=TPU_SCALE_FIRST,
    ),
    Case(
        "scale_first_group_32_in_float32", 38, 128, 128, 32,
        scale=F32, zeros=True, gpu_tiles=SCALE_FIRST, tpu_tiles=TPU_SCALE_FIRST,
    ),
    Case("e2m1", 9, 128, 256, 32, scale=F32, grid="e2m1", gpu_tiles=ONE),
    Case(
        "e2m1_scale_first_of_a_stack", 40, 128, 256, 32,
        grid="e2m1", layers=2, gpu_tiles=SCALE_FIRST, tpu_tiles=TPU_SCALE_FIRST,
    ),
    Case("nf4", 9, 96, 192, 64, scale=F32, grid=NF4),
    Case("nf4_f16_of_a_stack", 9, 96, 192, 64, F16, F16, grid=NF4, layers=2),
    Case("e2m1_group_16", 11, 128, 256, 16, grid="e2m1", gpu_tiles=ONE),
    Case(
        "e2m1_group_16_scale_first_f16", 38, 128, 128, 16, F16, F32,
        grid="e2m1", gpu_tiles=SCALE_FIRST, tpu_tiles=TPU_SCALE_FIRST,
    ),
    Case(
        "group_of_two_stages", 16, 64, 256, 128,
        gpu_tiles=Tiles(16, 1, 1, 64, 1, 3, 1, 1, False),
    ),
    Case("parts_of_K", 16, 64, 512, 128, gpu_tiles=Tiles(16, 1, 2, 128, 1, 2, 2, 1, True)),
    Case("uneven_splits", 8, 64, 384, 128, gpu_tiles=Tiles(8, 1, 1, 128, 1, 2, 2, 1, True)),
    Case("shared_x", 16, 128, 256, 128, gpu_tiles=Tiles(16, 1, 1, 128, 1, 3, 1, 2, False)),
    Case(
        "blocks", 40, 256, 256, 64,
        gpu_tiles=Tiles(24, 2, 1, 128, 2, 2, 1, 1, True), tpu_tiles=TpuTiles(16, 128, 128, True),
    ),
)  # fmt: skip
MODEL_CASES = (
    Case("wide_decode", 16, 28672, 8192, 128),
    Case("wide_down_decode", 16, 8192, 28672, 128),
    Case("wide_one_token", 1, 28672, 8192, 128),
    Case("wide_prefill", 8192, 28672, 8192, 128),
    Case("llama_8b_qkv_decode", 8, 6144, 4096, 128),
    Case("llama_8b_down_gptq", 16, 4096, 14336, 128, zeros=True),
    Case("llama_8b_down_of_32", 16, 4096, 14336, 128, scale=F32, layers=32),
    Case("llama_8b_gate_up_64", 64, 28672, 4096, 128),
    Case("llama_8b_gate_up_2048", 2048, 28672, 4096, 128, zeros=True),
    Case("llama_70b_tp8_down", 16, 8192, 3584, 128, scale=F32),
    Case("llama_70b_tp8_qkv_awq_f16", 8, 1280, 8192, 128, F16, F16, zeros=True),
    Case("qwen3_30b_qkv", 64, 5120, 2048, 128),
    Case("qwen3_30b_o_group_32", 256, 2048, 4096, 32),
    Case("gemma3_27b_gate_up", 16, 43008, 5376, 128),
    Case("gemma3_27b_down_group_64", 256, 5376, 21504, 64),
    Case("gpt_oss_20b_down_mxfp4", 16, 2880, 2880, 32, grid="e2m1"),
    Case("llama_8b_down_mxfp4", 16, 4096, 14336, 32, grid="e2m1"),
    Case("llama_8b_gate_up_2048_mxfp4", 2048, 28672, 4096, 32, grid="e2m1"),
    Case("llama_8b_down_nvfp4", 16, 4096, 14336, 16, grid="e2m1"),
    Case("llama_8b_gate_up_2048_nvfp4", 2048, 28672, 4096, 16, grid="e2m1"),
    Case("llama_8b_down_nf4_of_32", 16, 4096, 14336, 64, grid=NF4, layers=32),
    Case("llama_8b_o_per_channel", 16, 4096, 4096, 4096),
)


def inputs(case: Case, key: jax.Array, impl: Impl) -> tuple[jax.Array, ...]:
    """x, w, scale and, with zeros, zero."""
    del impl
    M, N, K, G = case.M, case.N, case.K, case.K // case.group
    x_key, w_key, s_key, z_key = jax.random.split(key, 4)
    x_MK = jax.random.normal(x_key, (M, K), case.dtype)
    dtype = jnp.uint4 if case.zeros or isinstance(case.grid, tuple) else jnp.int4
    L = () if case.layers is None else (case.layers,)
    w_NK = jax.lax.bitcast_convert_type(_nibbles(w_key, (*L, N, K)), dtype)
    if case.grid == "e2m1":  # whose least number is -7
        w_NK = jnp.maximum(w_NK.astype(jnp.int8), jnp.int8(-7)).astype(jnp.int4)
    amplitude = 1 / (K**0.5 * (6.5 if case.zeros else 4.6))  # for outputs of about 1
    scale_GN = jax.random.uniform(s_key, (*L, G, N), jnp.float32, 0.5, 1.5) * amplitude
    scale_GN = scale_GN.astype(case.scale)
    if not case.zeros:
        return x_MK, w_NK, scale_GN
    zero_GN = jax.random.randint(z_key, (*L, G, N), 0, 16).astype(case.scale)
    return x_MK, w_NK, scale_GN, zero_GN


def _nibbles(key, shape):
    return (jax.random.bits(key, shape, jnp.uint8) & jnp.uint8(15)).astype(jnp.uint4)


def call(
    case: Case, impl: Impl, device: Device, *, interpret: Any = False, tiles: Any = None
) -> Callable:
    tiles = tiles or {"mosaic_gpu": case.gpu_tiles, "mosaic_tpu": case.tpu_tiles}.get(impl)
    layer = None if case.layers is None else jnp.int32(case.layers - 1)
    options = {
        "grid": case.grid,
        "device": device,
        "impl": impl,
        "tiles": tiles,
        "interpret": interpret,
    }
    return partial(int4_matmul, layer=layer, **options)


def impls(case: Case, device: Device) -> tuple[Impl, ...]:
    if (
        device.platform == "tpu"
        and not isinstance(case.grid, tuple)
        and (case.N % 128 or case.K % 128)
    ):
        return ()
    return (choose(device, case.grid),)


def work(case: Case) -> Work:
    M, N, K, G = case.M, case.N, case.K, case.K // case.group
    scales = G * N * jnp.dtype(case.scale).itemsize * (1 + case.zeros)
    # Of codebooks XLA makes a copy.
    copy = None if isinstance(case.grid, tuple) else N * K * 2
    return Work(2 * M * N * K, N * K // 2 + (M * K + M * N) * 2 + scales, copy)


def problem_of(case: Case) -> tiling.Problem:
    stacked = case._replace(layers=case.layers or 1)
    shapes = jax.eval_shape(lambda key: inputs(stacked, key, "mosaic_gpu"), jax.random.key(0))
    return tiling.problem_of(*shapes, *([] if case.zeros else [None]), grid=case.grid)


def tuning_key(case: Case, device: Device) -> str:
    del device
    return tiling.tuning_key(problem_of(case))


def candidates(case: Case, device: Device) -> list[Tiles]:
    """Tiles that a benchmark should compare on a GPU, the most promising first."""
    if impls(case, device) != ("mosaic_gpu",):
        return []
    problem = problem_of(case)
    return sorted(
        tiling.candidates(problem, device), key=lambda t: tiling.cycles(t, problem, device)
    )
