"""Matrix product with 4-bit weights in groups: integers (GPTQ, AWQ), w = (q - zero) * scale, or
floats (MXFP4, NVFP4) or indices of a codebook (NF4, IQ4_NL), w = value of q * scale.

M tokens   K input features   N output features   G groups of K/G input features each
L layers of stacked weights
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from pallas_kernels.checks import check_dtype, check_one_of, check_rank, check_shape
from pallas_kernels.devices import Device, Impl, mosaic
from pallas_kernels.grids import Grid, dtype_of
from pallas_kernels.int4_matmul import mosaic_gpu, mosaic_tpu, reference

GROUPS = (16, 32, 64, 128)  # or all of K, a scale per output channel
IMPLS: tuple[Impl, ...] = ("reference", "mosaic_gpu", "mosaic_tpu")
OF_CODEBOOKS: tuple[Impl, ...] = ("reference", "xla")
NARROW = ("bfloat16", "float16")
FLOATS: dict[Impl, tuple[str, ...]] = {
    "reference": (*NARROW, "float32"), "xla": NARROW, "mosaic_gpu": NARROW, "mosaic_tpu": NARROW,
}  # fmt: skip


def choose(device: Device, grid: Grid = "int") -> Impl:
    """What `int4_matmul` runs on `device` unless told otherwise.

    No kernel takes a codebook: neither chip looks numbers up faster than XLA widens them.
    """
    if not isinstance(grid, tuple):
        return mosaic(device)
    return "reference" if device.platform == "cpu" else "xla"


def int4_matmul(
    x_MK: Float[Array, "M K"],
    w_NK: Integer[Array, "*L N K"],
    scale_GN: Float[Array, "*L G N"],
    zero_GN: Float[Array, "*L G N"] | None = None,
    *,
    grid: Grid = "int",
    layer: int | Int[Array, ""] | None = None,
    device: Device,
    impl: Impl | None = None,
    tiles: Any = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """x @ ((w - zero) * scale).T in x's dtype, summed in float32.

    x is bfloat16 or float16, or float32 for the reference. w is int4 without zero, or uint4 with
    zero; it stays packed, two in a byte, in device memory. scale has x's dtype or float32, zero
    has scale's; row g of both belongs to input features [g*K/G, (g+1)*K/G), K/G being 16, 32, 64,
    128 or K. Other dtypes, ranks and sizes are a ValueError. `tiles` overrides the kernel's choice.

    `grid` says what w stands for (grids.py). With "e2m1" it is a 4-bit float's half steps, and the
    scale is half of what that float's would be. With 16 numbers w, uint4, is an index of them;
    then the implementations are "reference" and "xla", and XLA writes a widened copy of the one
    matrix at every call.

    With a `layer`, w, scale and zero are stacked, [L, N, K] and so on, and a kernel reads that
    layer where it lies; a slice taken before the call would be a copy.
    """
    check_rank("x_MK", x_MK, 2)
    check_rank("w_NK", w_NK, 2 if layer is None else 3)
    impl = impl or choose(device, grid)
    check_one_of("impl", impl, OF_CODEBOOKS if isinstance(grid, tuple) else IMPLS)
    check_dtype("x_MK", x_MK, FLOATS[impl])
    check_dtype("w_NK", w_NK, (dtype_of(grid, zeros=zero_GN is not None),))
    check_shape("x_MK", x_MK, (x_MK.shape[0], w_NK.shape[-1]), why="its columns are w_NK's")
    if 0 in (*x_MK.shape, *w_NK.shape):
        raise ValueError(f"x_MK is {x_MK.shape} and w_NK {w_NK.shape}; no axis may be 0 long")
    check_scales(scale_GN, zero_GN, x_MK, w_NK)
    return run(
        x_MK, w_NK, scale_GN, zero_GN, layer,
        grid=grid, device=device, impl=impl, tiles=tiles, interpret=interpret,
    )  # fmt: skip


def check_scales(scale_GN, zero_GN, x_MK, w_NK) -> None:
    """Groups of a size that the kernels know, of K and N as w_NK has them."""
    check_rank("scale_GN", scale_GN, w_NK.ndim)
    check_dtype("scale_GN", scale_GN, dict.fromkeys((x_MK.dtype.name, "float32")))
    *L, N, K = w_NK.shape
    G = scale_GN.shape[-2]
    check_shape("scale_GN", scale_GN, (*L, G, N), why="its columns are w_NK's rows")
    if G == 0 or K % G or K // G not in (*GROUPS, K):
        raise ValueError(
            f"scale_GN has {G} rows for K = {K}; K/G must be {', '.join(map(str, GROUPS))} or K"
        )
    if zero_GN is not None:
        check_shape("zero_GN", zero_GN, scale_GN.shape, why="every scale has a zero")
        check_dtype("zero_GN", zero_GN, (scale_GN.dtype,))


def run(
    x_MK, w, scale, zero, layer, *,
    grid: Grid, device: Device, impl: Impl, tiles: Any, interpret: Any,
):  # fmt: skip
    """The product by a named implementation, of arguments that are known to be right."""
    if impl in ("reference", "xla"):
        pick = lambda a: a if a is None or layer is None else a[layer]
        by = reference.matmul if impl == "reference" else reference.narrow_matmul
        return by(x_MK, pick(w), pick(scale), pick(zero), grid)
    if layer is None:
        layer = 0
        w, scale, zero = w[None], scale[None], None if zero is None else zero[None]
    kernel = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}[impl]
    return kernel.matmul(
        x_MK, w, scale, zero, jnp.asarray(layer, jnp.int32)[None],
        grid=grid, device=device, tiles=tiles, interpret=interpret,
    )  # fmt: skip
