"""What tests, the compile gate, benchmarks and tuning run; see pallas_kernels/cases.py."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Work
from pallas_kernels.devices import Device, Impl, mosaic
from pallas_kernels.int4_matmul import mosaic_tpu
from pallas_kernels.int4_matmul import tiles as tiling
from pallas_kernels.int4_matmul.tiles import Tiles
from pallas_kernels.int8_matmul import Activations, choose, int8_grouped_matmul, int8_matmul


class Case(NamedTuple):
    name: str
    M: int
    N: int
    K: int
    activations: Activations
    group: int | None = None  # None: a scale per output channel
    zeros: bool = False
    dtype: str = "bfloat16"
    layers: int | None = None  # of a stack, whose last is multiplied by
    gpu_tiles: Tiles | None = None  # instead of the kernel's own choice
    tpu_tiles: mosaic_tpu.Tiles | None = None


F16 = "float16"
TWO = Tiles(8, 2, 1, 128, 1, 2, 1, 1, True)  # warpgroups: see int4_matmul.cases
CASES = (
    Case("one_token", 1, 128, 256, "float", gpu_tiles=TWO),
    Case("of_a_stack", 3, 128, 128, "float", layers=2, gpu_tiles=TWO),
    Case("float16", 24, 128, 256, "float", dtype=F16, gpu_tiles=TWO._replace(tokens=24)),
    Case("splits", 8, 64, 256, "float", gpu_tiles=Tiles(8, 1, 1, 64, 1, 2, 2, 1, False)),
    Case("group_128", 16, 128, 256, "float", 128, gpu_tiles=TWO._replace(tokens=16)),
    Case("group_32_zeros", 9, 128, 256, "float", 32, zeros=True, gpu_tiles=TWO._replace(tokens=16)),
    Case("group_64_zeros_f16_of_a_stack", 3, 128, 128, "float", 64, zeros=True, dtype=F16, layers=2,
         gpu_tiles=TWO),
    Case("group_16", 9, 128, 256, "float", 16, gpu_tiles=TWO._replace(tokens=16)),
    Case(
        "group_32_zeros_scale_first", 38, 128, 128, "float", 32, zeros=True,
        gpu_tiles=Tiles(40, 2, 1, 128, 1, 2, 1, 1, False),
        tpu_tiles=mosaic_tpu.Tiles(48, 128, 128, False),
    ),
    Case(
        "group_32_scale_first", 48, 128, 128, "float", 32,
        gpu_tiles=Tiles(48, 2, 1, 128, 1, 2, 1, 1, False),
        tpu_tiles=mosaic_tpu.Tiles(48, 128, 128, False),
    ),
)  # fmt: skip
MODEL_CASES = (
    Case("wide_decode", 16, 28672, 8192, "float"),
    Case("wide_decode_int8", 16, 28672, 8192, "int8"),
    Case("llama_8b_qkv_one_token", 1, 6144, 4096, "float"),
    Case("llama_8b_down_of_32", 16, 4096, 14336, "float", layers=32),
    Case("llama_8b_down_of_32_int8", 16, 4096, 14336, "int8", layers=32),
    Case("llama_8b_down_64_int8", 64, 4096, 14336, "int8"),
    Case("llama_8b_gate_up_2048", 2048, 28672, 4096, "float"),
    Case("llama_8b_gate_up_2048_int8", 2048, 28672, 4096, "int8"),
    Case("llama_70b_tp8_down", 16, 8192, 3584, "float"),
    Case("llama_70b_tp8_gate_up_8192_int8", 8192, 7168, 8192, "int8"),
    Case("qwen3_30b_o_f16", 256, 2048, 4096, "float", dtype=F16),
    Case("gemma3_27b_gate_up", 8, 43008, 5376, "float"),
    Case("gemma3_27b_down_int8", 256, 5376, 21504, "int8"),
    Case("llama_8b_down_group_128", 16, 4096, 14336, "float", 128),
    Case("llama_8b_down_zeros", 16, 4096, 14336, "float", 32, True),
    Case("llama_8b_down_q6", 16, 4096, 14336, "float", 16),
    Case("llama_8b_gate_up_2048_q6", 2048, 28672, 4096, "float", 16),
    Case("llama_8b_gate_up_2048_zeros", 2048, 28672, 4096, "float", 32, True),
    Case("llama_8b_gate_up_2048_group_128", 2048, 28672, 4096, "float", 128),
)


def inputs(case: Case, key: jax.Array, impl: Impl) -> tuple[jax.Array, ...]:
    """x, w, scale and, with zeros, zero."""
    del impl
    M, N, K = case.M, case.N, case.K
    x_key, w_key, s_key, z_key = jax.random.split(key, 4)
    x_MK = jax.random.normal(x_key, (M, K), case.dtype)
    L = () if case.layers is None else (case.layers,)
    w_NK = jax.lax.bitcast_convert_type(jax.random.bits(w_key, (*L, N, K), jnp.uint8), jnp.int8)
    amplitude = 1 / (K**0.5 * 74)  # for outputs of about 1
    shape = (*L, N) if case.group is None else (*L, K // case.group, N)
    scale = jax.random.uniform(s_key, shape, jnp.float32, 0.5, 1.5) * amplitude
    if case.group is None:
        return x_MK, w_NK, scale
    scale = scale.astype(case.dtype)
    if not case.zeros:
        return x_MK, w_NK, scale
    return x_MK, w_NK, scale, jax.random.randint(z_key, shape, -128, 128).astype(case.dtype)


def call(
    case: Case, impl: Impl, device: Device, *, interpret: Any = False, tiles: Any = None
) -> Callable:
    tiles = tiles or {"mosaic_gpu": case.gpu_tiles, "mosaic_tpu": case.tpu_tiles}.get(impl)
    layer = None if case.layers is None else jnp.int32(case.layers - 1)
    options = {
        "device": device, "impl": impl, "tiles": tiles, "interpret": interpret, "layer": layer,
    }  # fmt: skip
    if case.group is None:
        return partial(int8_matmul, activations=case.activations, **options)
    return partial(int8_grouped_matmul, **options)


def impls(case: Case, device: Device) -> tuple[Impl, ...]:
    if case.group is not None:
        return (mosaic(device),)
    return (choose(device, case.activations),)


def work(case: Case) -> Work:
    M, N, K = case.M, case.N, case.K
    scales = N * 4 if case.group is None else K // case.group * N * 2 * (1 + case.zeros)
    # int8 is what an int8 product multiplies: of those there is nothing to dequantise.
    copy = N * K * 2 if case.activations == "float" else None
    return Work(2 * M * N * K, N * K + (M * K + M * N) * 2 + scales, copy)


def problem_of(case: Case) -> tiling.Problem:
    groups, scale = (1, "float32") if case.group is None else (case.K // case.group, case.dtype)
    return tiling.Problem(
        case.M,
        case.N,
        case.K,
        groups,
        8,
        jnp.dtype(case.dtype),
        jnp.dtype(scale),
        case.zeros,
        "int",
    )


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
