"""The shapes that tests, the compile gate, benchmarks and tuning all run; see
pallas_kernels/cases.py for the names. Add one here, get all four."""

import itertools
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import Work
from pallas_kernels.devices import Device, Impl
from pallas_kernels.grids import Grid
from pallas_kernels.grouped_matmul import choose, grouped_matmul
from pallas_kernels.grouped_matmul.weights import BLOCK, form_of
from pallas_kernels.grouped_matmul.weights import tuning_key as key_of

BF16 = jnp.dtype(jnp.bfloat16)
F16 = jnp.dtype(jnp.float16)
F32 = jnp.dtype(jnp.float32)


class Case(NamedTuple):
    name: str
    sizes: tuple[int, ...]  # rows of each expert
    K: int
    N: int
    weights: str = "float"  # or a dtype: int8, int4, uint4; or fp8_tensor, fp8_channel, fp8_block
    group: int = 0  # of integers; 0: all of K
    zeros: bool = False  # of int8 in groups, as uint4 always has
    grid: Grid = "int"
    padding: int = 0  # rows past the last expert's
    dtype: Any = BF16
    scale_dtype: Any = None  # None: dtype; e4m3's are float32
    layers: int = 0  # of a stack, whose last is multiplied by; 0: not stacked
    tiles: tuple = ()  # ((impl, the fields of its Tiles), ...) that replace the kernel's choice


def _spread(rows: int, experts: int) -> tuple[int, ...]:
    """Uneven sizes as a router gives them: multinomial, the same every time."""
    rng = np.random.default_rng(0)
    chance = rng.dirichlet(np.full(experts, 8.0))
    return tuple(map(int, rng.multinomial(rows, chance)))


# A codebook of llama.cpp.
IQ4_NL = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
    1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
# Boundaries at any row, groups without rows, more tiles than thread blocks.
RAGGED = (5, 0, 13, 1, 0, 9)
_gpu = lambda *tiles: (("mosaic_gpu", tiles),)
CASES = (
    # float32, which the GPU does not take
    Case("float32", (5, 0, 9, 3), K=192, N=256, dtype=F32, padding=3),
    Case("float32_one_group", (0, 19, 0), K=128, N=128, dtype=F32),
    # float16, which the TPU does not take
    Case("float16", (3, 6), K=128, N=64, dtype=F16),
    Case("float16_int4", (3, 6), K=128, N=64, weights="int4", group=64, dtype=F16),
    # both
    Case("ragged", RAGGED, K=192, N=128, padding=9, tiles=_gpu(16, 64, 2, 64, 2, 2, 2)),
    Case("one_group", (0, 40), K=128, N=64, tiles=_gpu(16, 64, 1, 64, 2, 8, 1)),
    Case("no_rows", (0, 0), K=128, N=64, padding=9),
    Case("of_a_stack", (3, 0, 6), K=128, N=64, padding=2, layers=2),
    Case("int4_of_a_stack", (3, 6), K=128, N=64, weights="uint4", group=64, padding=1, layers=3),
    Case("fp8_of_a_stack", (3, 6), K=128, N=64, weights="fp8_block", layers=2),
    Case("tails", (7, 2), K=192, N=136, tiles=_gpu(16, 64, 1, 128, 2, 8, 2)),
    # 128 features of a warpgroup, and quarters of 64 rows: 7 of 16, 39 of 48, 64 of 64
    Case("quarters", (7, 32, 65), K=128, N=128, tiles=_gpu(64, 128, 1, 64, 2, 8, 2)),
    Case("int8", RAGGED, K=192, N=128, weights="int8", tiles=_gpu(16, 64, 2, 128, 2, 8, 2)),
    Case("int8_f32_scale", (3, 6), K=128, N=64, weights="int8", scale_dtype=F32),
    Case("iq4_nl", RAGGED, K=192, N=72, weights="uint4", group=32, grid=IQ4_NL, padding=3),
    Case("e2m1_16", RAGGED, K=192, N=72, weights="int4", group=16, grid="e2m1", padding=3),
    Case("int8_16", (3, 0, 6), K=128, N=128, weights="int8", group=16),
    Case("int8_32", RAGGED, K=192, N=72, weights="int8", group=32, padding=3),
    Case("int8_32_zeros", (3, 0, 6), K=128, N=128, weights="int8", group=32, zeros=True),
    Case("int8_64_zeros_f16_of_a_stack", (3, 6), K=128, N=64, weights="int8", group=64, zeros=True,
         dtype=F16, layers=2),
    Case("int4_128", RAGGED, K=256, N=64, weights="int4", group=128,
         tiles=_gpu(16, 64, 1, 128, 2, 8, 2)),
    Case("int4_all", (3, 6), K=192, N=64, weights="int4", tiles=_gpu(16, 64, 1, 64, 2, 8, 1)),
    Case("e2m1_32", RAGGED, K=192, N=72, weights="int4", group=32, grid="e2m1", padding=3),
    Case("e2m1_of_a_stack_f16", (3, 6), K=128, N=64, weights="int4", group=32, grid="e2m1",
         dtype=F16, layers=2),
    Case("uint4_32", (3, 6), K=192, N=64, weights="uint4", group=32, padding=1),
    Case("uint4_64", (3, 0, 6), K=192, N=128, weights="uint4", group=64, scale_dtype=F32),
    Case("fp8_tensor", (3, 6), K=128, N=64, weights="fp8_tensor"),
    Case("fp8_channel", RAGGED, K=128, N=64, weights="fp8_channel",
         tiles=_gpu(16, 64, 1, 128, 2, 8, 2)),
    Case("fp8_block", RAGGED, K=320, N=192, weights="fp8_block",
         tiles=_gpu(16, 64, 2, 128, 2, 8, 2)),
)  # fmt: skip


def _model(name: str, rows: tuple[int, ...], experts: int, K: int, N: int, **options):
    """A model's layer for each number of rows: its tokens times its experts for each."""
    return tuple(Case(f"{name}_{r}", _spread(r, experts), K=K, N=N, **options) for r in rows)


INT4 = {"weights": "int4", "group": 128}
MXFP4 = {"weights": "int4", "group": 32, "grid": "e2m1"}
MODEL_CASES = (
    *_model("qwen3_up", (64, 512, 16384), 128, 2048, 1536),
    *_model("qwen3_down", (512, 16384), 128, 768, 2048),
    *_model("qwen3_up_int4", (64, 16384), 128, 2048, 1536, **INT4),
    *_model("qwen3_up_int4_of_4", (512,), 128, 2048, 1536, layers=4, **INT4),
    *_model("qwen3_up_int8", (64, 16384), 128, 2048, 1536, weights="int8"),
    *_model("qwen3_up_int8_32", (64, 16384), 128, 2048, 1536, weights="int8", group=32),
    *_model("qwen3_up_q5", (64, 16384), 128, 2048, 1536, weights="int8", group=32, zeros=True),
    *_model("deepseek_up", (256, 16384), 32, 7168, 4096, weights="fp8_block"),
    *_model("deepseek_down", (16384,), 32, 2048, 7168, weights="fp8_block"),
    *_model("gpt_oss_up", (32, 8192), 128, 2880, 5760),
    *_model("gpt_oss_up_int4", (32, 8192), 128, 2880, 5760, weights="uint4", group=32),
    *_model("gpt_oss_up_mxfp4", (32, 8192), 128, 2880, 5760, **MXFP4),
    *_model("gpt_oss_down_mxfp4_of_2", (32,), 32, 2880, 2880, layers=2, **MXFP4),
    *_model("qwen3_up_nvfp4", (64, 16384), 128, 2048, 1536, **MXFP4 | {"group": 16}),
    *_model("qwen3_up_q6", (64, 16384), 128, 2048, 1536, weights="int8", group=16),
    *_model("mixtral_up", (4096,), 8, 4096, 28672),
    *_model("mixtral_up_fp8", (4096,), 8, 4096, 28672, weights="fp8_channel"),
)  # fmt: skip


def impls(case: Case, device: Device) -> tuple[Impl, ...]:
    best = choose(device, case.grid)
    if case.dtype == F32 and best == "mosaic_gpu":
        return ("reference",)
    if case.dtype == F16 and best == "mosaic_tpu":
        return ("reference",)
    return (best,)


def inputs(case: Case, key: jax.Array, impl: Impl) -> tuple:
    """(x, w, sizes, scale, zero)."""
    M, K, N = sum(case.sizes) + case.padding, case.K, case.N
    E = (case.layers, len(case.sizes)) if case.layers else (len(case.sizes),)
    kx, kw, ks, kz = jax.random.split(key, 4)
    x = jax.random.normal(kx, (M, K), case.dtype)
    sizes = jnp.asarray(case.sizes, jnp.int32)
    uniform = lambda *shape: jax.random.uniform(ks, shape, minval=0.5, maxval=1.5)
    scale_dtype = case.scale_dtype or case.dtype
    if case.weights == "float":
        w = jax.random.normal(kw, (*E, N, K), case.dtype) * jnp.asarray(K**-0.5, case.dtype)
        return x, w, sizes, None, None
    if case.weights.startswith("fp8"):
        w = jax.random.normal(kw, (*E, N, K), BF16).astype(jnp.float8_e4m3fn)
        shape = {"tensor": (), "channel": (N,), "block": (-(-N // BLOCK), -(-K // BLOCK))}
        return x, w, sizes, uniform(*E, *shape[case.weights.removeprefix("fp8_")]), None
    if case.weights == "int8" and not case.group:
        w = jax.random.randint(kw, (*E, N, K), -128, 128, jnp.int8)
        return x, w, sizes, uniform(*E, N).astype(scale_dtype), None
    G = K // case.group if case.group else 1
    ranges = {"int4": (-7 if case.grid == "e2m1" else -8, 8), "uint4": (0, 16), "int8": (-128, 128)}
    w = jax.random.randint(kw, (*E, N, K), *ranges[case.weights], jnp.int8)
    zero = None
    if case.zeros or (case.weights == "uint4" and case.grid == "int"):
        zero = jax.random.randint(kz, (*E, G, N), *ranges[case.weights], jnp.int8)
        zero = zero.astype(scale_dtype)
    return x, w.astype(case.weights), sizes, uniform(*E, G, N).astype(scale_dtype), zero


def call(case: Case, impl: Impl, device: Device, *, interpret: Any = False, tiles: Any = None):
    """The product of `inputs`: y_MN."""
    fields = dict(case.tiles).get(impl)
    if tiles is None and fields is not None:
        tiles = import_module(f"pallas_kernels.grouped_matmul.{impl}").Tiles(*fields)

    layer = jnp.int32(case.layers - 1) if case.layers else None

    def run(x_MK, w_ENK, sizes_E, scale, zero):
        return grouped_matmul(
            x_MK, w_ENK, sizes_E, scale=scale, zero=zero, grid=case.grid, layer=layer,
            device=device, impl=impl, tiles=tiles, interpret=interpret,
        )  # fmt: skip

    return run


def _abstract(case: Case) -> tuple:
    """`inputs` of one layer."""
    one_layer = case._replace(layers=0)
    return jax.eval_shape(lambda key: inputs(one_layer, key, "reference"), jax.random.key(0))


def tuning_key(case: Case, device: Device) -> str:
    del device
    x, w, _, scale, zero = _abstract(case)
    return key_of(x, w, len(case.sizes), scale, form_of(x, w, scale, zero, case.grid))


def candidates(case: Case, device: Device) -> tuple[Any, ...]:
    """Tiles worth timing, the kernel's own choice first; some may not fit in SMEM or VMEM."""
    E = len(case.sizes)
    x, w, _, scale, zero = _abstract(case)
    impl = impls(case, device)[0]
    if impl == "reference":
        return ()
    kernel = import_module(f"pallas_kernels.grouped_matmul.{impl}")
    form = form_of(x, w, scale, zero, case.grid)
    if impl == "mosaic_tpu":
        own = kernel.choose_tiles(x, w, E, form, device)
        sweep = itertools.product((32, 64, 128, 256), (128, 256, 512, 1024, 2048))
        return tuple(dict.fromkeys((own, *(kernel.Tiles(*t) for t in sweep if t[1] <= case.N))))
    from pallas_kernels.grouped_matmul import mosaic_gpu_tiles

    own = mosaic_gpu_tiles.choose_tiles(x, w, E, scale, zero, form, device)
    sweep = [
        own._replace(rows=rows, warpgroups=warpgroups, stages=stages, side=side)
        for rows, warpgroups, stages, side in itertools.product(
            {own.rows // 2, own.rows, min(own.rows * 2, 256)} - {8},
            {2, 4} if own.cols == 64 else {2},
            range(max(own.stages - 1, 2), own.stages + 1),
            (4, 8, 16),
        )
    ]
    return tuple(dict.fromkeys((own, *sweep)))


def work(case: Case) -> Work:
    args = jax.eval_shape(lambda key: inputs(case, key, "reference"), jax.random.key(0))
    x, w, _, scale, zero = args
    rows, used = sum(case.sizes), sum(n > 0 for n in case.sizes)
    bits = lambda a: 0 if a is None else a.size * jax.dtypes.itemsize_bits(a.dtype)
    per_expert = (
        (bits(w) + bits(scale) + bits(zero)) // 8 // (len(case.sizes) * max(case.layers, 1))
    )
    itemsize = case.dtype.itemsize
    return Work(
        flops=2 * rows * case.K * case.N,
        bytes=per_expert * used + (rows * case.K + x.shape[0] * case.N) * itemsize,
        forbidden_bytes=w.size * itemsize,
    )
