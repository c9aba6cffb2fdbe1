"""The shapes that tests, the compile gate and benchmarks all run."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Work
from pallas_kernels.devices import Device, Impl
from pallas_kernels.fp8_matmul import (
    Activations,
    choose,
    fp8_matmul,
    mosaic_gpu,
    mosaic_gpu_decode,
    mosaic_tpu,
)
from pallas_kernels.fp8_matmul import tuning_key as key_of

Scales = Literal["tensor", "static", "channel", "block"]


class Case(NamedTuple):
    name: str
    M: int
    N: int
    K: int
    scales: Scales = "block"  # "static": of the tensor, and one of x beside it
    activations: Activations = "e4m3"
    dtype: str = "bfloat16"
    layers: int | None = None  # of a stack, whose last is multiplied by
    # Tiles of the kernels where a small case would not reach a feature by itself.
    gpu: mosaic_gpu.Tiles | mosaic_gpu_decode.DecodeTiles | None = None
    tpu: mosaic_tpu.Tiles | None = None
    cores: int | None = None  # of the device, so that one has several tiles


_Many, _Few, _TPU = mosaic_gpu.Tiles, mosaic_gpu_decode.DecodeTiles, mosaic_tpu.Tiles

CASES = (
    # Few tokens: weights first, K in parts.
    Case("one_token", 1, 128, 256),
    Case("few_of_a_stack", 3, 128, 272, layers=3),
    Case("few_partial_blocks", 5, 200, 656, gpu=_Few(1, 3), tpu=_TPU(5, 128, 256, False)),
    Case("few_split", 9, 136, 656, gpu=_Few(2, 2), tpu=_TPU(9, 256, 384, False)),
    Case(
        "few_two_token_tiles_f16", 70, 64, 256, dtype="float16",
        gpu=_Few(1, 2), tpu=_TPU(64, 128, 128, False),
    ),
    # Many tokens: persistent tiles.
    Case(
        "many_256_f16", 260, 64, 272, dtype="float16",
        gpu=_Many(256, 2, 1, 1), tpu=_TPU(264, 128, 384, True),
    ),
    Case("many_multicast", 100, 264, 272, gpu=_Many(128, 2, 2, 2), tpu=_TPU(100, 128, 128, True)),
    Case(
        "many_tiles_a_cluster", 300, 200, 272, gpu=_Many(256, 2, 2, 2), cores=2,
        tpu=_TPU(152, 256, 256, True),
    ),
    Case(
        "many_tiles_a_core", 140, 264, 272, gpu=_Many(128, 3, 1, 2), cores=2,
        tpu=_TPU(72, 128, 256, False),
    ),
    Case("many_of_a_stack", 130, 136, 144, layers=2),
    Case("channel", 20, 96, 200, "channel"),
    Case("channel_of_a_stack", 20, 96, 200, "channel", layers=2),
    Case("channel_f16", 20, 96, 200, "channel", dtype="float16"),
    Case("tensor", 20, 96, 200, "tensor"),
    Case("static", 20, 96, 200, "static"),
    Case("channel_float", 20, 96, 200, "channel", "float"),
    Case("tensor_float_f16_of_a_stack", 3, 96, 200, "tensor", "float", "float16", layers=2),
    Case("block_float", 20, 200, 272, "block", "float"),
    Case("static_of_a_stack", 20, 96, 200, "static", layers=2),
)  # fmt: skip

MODEL_CASES = (
    Case("deepseek_v3_down_1", 1, 7168, 18432),
    Case("deepseek_v3_down_64", 64, 7168, 18432),
    Case("deepseek_v3_up_16", 16, 18432, 7168),
    Case("deepseek_v3_up_2048", 2048, 18432, 7168),
    Case("deepseek_v3_q_a_16", 16, 1536, 7168),
    Case("deepseek_v3_q_b_2048", 2048, 24576, 1536),
    Case("deepseek_v3_kv_a_64", 64, 576, 7168),
    Case("deepseek_v3_kv_a_2048", 2048, 576, 7168),
    Case("deepseek_v3_o_128", 128, 7168, 16384),
    Case("deepseek_v3_o_8192", 8192, 7168, 16384),
    Case("qwen3_30b_a3b_q_16", 16, 4096, 2048),
    Case("qwen3_30b_a3b_q_16_of_48", 16, 4096, 2048, layers=48),
    Case("qwen3_30b_a3b_kv_2048", 2048, 512, 2048),
    Case("square_8192", 8192, 8192, 8192),
    Case("llama3_8b_up_16", 16, 14336, 4096, "channel"),
    Case("llama3_8b_down_2048_of_8", 2048, 4096, 14336, layers=8),
    Case("llama3_8b_down_2048", 2048, 4096, 14336, "channel"),
    Case("llama3_8b_up_16_float_of_32", 16, 14336, 4096, "channel", "float", layers=32),
    Case("llama3_8b_down_2048_float", 2048, 4096, 14336, "channel", "float"),
    Case("llama3_8b_down_64_static", 64, 4096, 14336, "static"),
)


def inputs(case: Case, key: jax.Array, impl: Impl):
    """(x_MK, w_NK, w_scale), and x_scale for "static"."""
    kx, kw, ks = jax.random.split(key, 3)
    x_MK = jax.random.normal(kx, (case.M, case.K), case.dtype)
    # Normal values would leave most of e4m3's range unused: 64 makes rare ones reach its end.
    stack = () if case.layers is None else (case.layers,)
    w_NK = jax.random.normal(kw, (*stack, case.N, case.K), jnp.bfloat16) * jnp.bfloat16(64)
    w_NK = jnp.clip(w_NK, -448, 448).astype(jnp.float8_e4m3fn)
    blocks = -(-case.N // 128), -(-case.K // 128)
    shape = {"tensor": (), "static": (), "channel": (case.N,), "block": blocks}[case.scales]
    w_scale = jax.random.uniform(ks, (*stack, *shape), jnp.float32, 0.5, 2.0) / (64 * case.K**0.5)
    # Clips past 4.48.
    static = (jnp.full(stack, 1 / 100, jnp.float32),) if case.scales == "static" else ()
    return x_MK, w_NK, w_scale, *static


def call(case: Case, impl: Impl, device: Device, *, interpret=False, tiles=None):
    tiles = tiles or {"mosaic_gpu": case.gpu, "mosaic_tpu": case.tpu}.get(impl)
    device = device._replace(cores=case.cores or device.cores)
    layer = None if case.layers is None else jnp.int32(case.layers - 1)

    def run(x_MK, w_NK, w_scale, x_scale=None):
        return fp8_matmul(
            x_MK, w_NK, w_scale, x_scale=x_scale, activations=case.activations, layer=layer,
            device=device, impl=impl, interpret=interpret, tiles=tiles,
        )  # fmt: skip

    return run


def impls(case: Case, device: Device) -> tuple[Impl, ...]:
    blocks = case.scales == "block"
    return (choose(device, N=case.N, K=case.K, blocks=blocks, activations=case.activations),)


def tuning_key(case: Case, device: Device) -> str:
    del device
    return key_of(case.M, case.N, case.K, case.dtype)


def candidates(case: Case, device: Device) -> tuple:
    """Tiles worth timing, the heuristic's choice first."""
    if impls(case, device)[0] == "mosaic_tpu":
        first = mosaic_tpu.tiles(case.M, case.N, case.K, device)
        others = (
            first._replace(N=N, K=K, fold=fold)
            for N in (512, 1024, 2048, 4096)
            for K in (512, 1024, 2048, case.K)
            for fold in {first.fold, case.M > mosaic_tpu.FEW}
            if not case.K % K and N * K <= 2**23
        )
    elif impls(case, device)[0] == "mosaic_gpu":
        many = mosaic_gpu.tiles(case.M, case.N, device)
        few = mosaic_gpu_decode.tiles(case.M, case.N, case.K, device)
        rows = (many._replace(rows=r, stages=s) for r, s in ((256, 4), (128, 6), (128, 4)))
        others = [
            t._replace(cluster=c, width=w) for t in rows for c in (1, 2) for w in (4, 8, 16)
        ] * (case.M > 32)
        splits = {s for s in (1, 2, 3, 4, 6, 8, 12, 16, 24) if s <= case.K // 128}
        others += [few._replace(split=s, stages=n) for s in sorted(splits) for n in (4, 6)] * (
            case.M <= 512
        )
        first = many if case.M > 64 else few
    else:
        return ()
    return tuple(dict.fromkeys((first, *others)))


def work(case: Case) -> Work:
    """Activations are read in 16 bits. Their e4m3 copy may be made, and none of the weights."""
    M, N, K = case.M, case.N, case.K
    return Work(2 * M * N * K, M * K * 2 + N * K + M * N * 2, forbidden_bytes=2 * N * K + M * K)
