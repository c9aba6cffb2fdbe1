"""Matrix product with int8 weights: a scale per output channel, or a scale and a zero per group.

M tokens   K input features   N output features   G groups of K/G input features each

What runs where, and why:
    activations  device  impl
    int8         all     xla: one int8 product, the scales on its int32 result
    float        TPU     xla: the widening of w fuses into the product
    float        GPU     mosaic_gpu: where XLA takes cuBLASLt it writes a widened copy of w first
    by group     all     the kernels of int4_matmul, which take int8 as they take int4
"""

from typing import Any, Literal

from jaxtyping import Array, Float, Float32, Int, Int8

from pallas_kernels import int4_matmul
from pallas_kernels.checks import check_dtype, check_one_of, check_rank, check_shape
from pallas_kernels.devices import Device, Impl, mosaic
from pallas_kernels.int8_matmul import reference

Activations = Literal["int8", "float"]
IMPLS: dict[str, tuple[Impl, ...]] = {
    "int8": ("reference", "xla"),
    "float": ("reference", "xla", "mosaic_gpu"),
}


def choose(device: Device, activations: Activations) -> Impl:
    """What `int8_matmul` runs on `device` unless told otherwise."""
    if device.platform == "cpu":
        return "reference"
    return "mosaic_gpu" if activations == "float" and device.platform == "cuda" else "xla"


def int8_matmul(
    x_MK: Float[Array, "M K"],
    w_NK: Int8[Array, "*L N K"],
    scale_N: Float32[Array, "*L N"],
    *,
    layer: int | Int[Array, ""] | None = None,
    activations: Activations,
    device: Device,
    impl: Impl | None = None,
    tiles: Any = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """x @ (w * scale).T in x's dtype: bfloat16 or float16, or float32 for the reference.

    With `activations` "int8" each token of x is first rounded to 127 steps of its largest value
    and the sum over K is exact; with "float" x is taken as it is and the sum is float32. w is
    int8 in device memory either way: no widened copy of it is made. `tiles` is mosaic_gpu's.
    Other dtypes, ranks and sizes are a ValueError. With a `layer`, w and scale are stacked,
    [L, N, K] and [L, N], and that layer is meant.
    """
    check_one_of("activations", activations, ("int8", "float"))
    impl = impl or choose(device, activations)
    check_one_of("impl", impl, IMPLS[activations])
    check(x_MK, w_NK, layer, impl)
    check_rank("scale_N", scale_N, w_NK.ndim - 1)
    check_shape("scale_N", scale_N, w_NK.shape[:-1], why="every row of w_NK has a scale")
    check_dtype("scale_N", scale_N, ("float32",))
    if impl == "mosaic_gpu":
        scale_GN = scale_N[..., None, :]
        return int4_matmul.run(
            x_MK, w_NK, scale_GN, None, layer,
            grid="int", device=device, impl=impl, tiles=tiles, interpret=interpret,
        )  # fmt: skip
    if layer is not None:  # XLA reads the layer's weights where they lie
        w_NK, scale_N = w_NK[layer], scale_N[layer]
    if activations == "int8":
        return reference.int8_activations(x_MK, w_NK, scale_N)
    return reference.float_activations(x_MK, w_NK, scale_N)


def int8_grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_NK: Int8[Array, "*L N K"],
    scale_GN: Float[Array, "*L G N"],
    zero_GN: Float[Array, "*L G N"] | None = None,
    *,
    layer: int | Int[Array, ""] | None = None,
    device: Device,
    impl: Impl | None = None,
    tiles: Any = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """`int4_matmul.int4_matmul` for int8 weights, with zero or without: (w - zero) * scale.

    Unsigned 8-bit numbers (GPTQ) are stored less 128, their zeros too. A zero need not be whole
    (GGUF's minima over their scales): the difference is rounded to x's dtype.
    """
    impl = impl or mosaic(device)
    check_one_of("impl", impl, int4_matmul.IMPLS)
    check(x_MK, w_NK, layer, impl)
    int4_matmul.check_scales(scale_GN, zero_GN, x_MK, w_NK)
    return int4_matmul.run(
        x_MK, w_NK, scale_GN, zero_GN, layer,
        grid="int", device=device, impl=impl, tiles=tiles, interpret=interpret,
    )  # fmt: skip


def check(x_MK, w_NK, layer, impl: Impl) -> None:
    check_rank("x_MK", x_MK, 2)
    check_rank("w_NK", w_NK, 2 if layer is None else 3)
    check_dtype("x_MK", x_MK, int4_matmul.FLOATS.get(impl, int4_matmul.NARROW))
    check_dtype("w_NK", w_NK, ("int8",))
    check_shape("x_MK", x_MK, (x_MK.shape[0], w_NK.shape[-1]), why="its columns are w_NK's")
    if 0 in (*x_MK.shape, *w_NK.shape):
        raise ValueError(f"x_MK is {x_MK.shape} and w_NK {w_NK.shape}; no axis may be 0 long")
