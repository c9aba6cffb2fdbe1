"""Matrix products of a mixture of experts: rows sorted by expert, one weight matrix for each.

M rows   E experts   K input features   N output features   G groups of K/G input features each

Weights are [E, N, K] with K contiguous, as checkpoints store them. By their dtype:

    float       that of x: multiplied as they are
    int8        w * scale_EN, a scale for each output channel; or w * scale_EGN or
                (w - zero_EGN) * scale_EGN, in groups as uint4
    int4        w * scale_EGN, a scale for each group of 16, 32, 64, 128 or all of K; with `grid`
                "e2m1" for what w stands for, the half steps of a 4-bit float (MXFP4, NVFP4), see
                pallas_kernels/grids.py
    uint4       (w - zero_EGN) * scale_EGN; or, `grid` being 16 numbers, grid[w] * scale_EGN
    e4m3        w * scale, with x rounded to e4m3 as fp8_matmul rounds it: a scale for each row
                with scale_E or scale_EN, for each row's every 128 of K with scale_Enk, whose
                scales hold for 128 of N by 128 of K (ceil(N/128), ceil(K/128))
"""

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import checks
from pallas_kernels.devices import Device, Impl, mosaic
from pallas_kernels.grids import Grid
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.weights import Form, form_of

IMPLS = ("reference", "mosaic_gpu", "mosaic_tpu")
FLOATS = ("bfloat16", "float16", "float32")


def choose(device: Device, grid: Grid = "int") -> Impl:
    """What `grouped_matmul` runs on `device` unless told otherwise.

    No kernel takes a codebook: the reference widens one expert after another, of those with rows.

    Never lax.ragged_dot: on GPUs XLA multiplies a masked copy of x for every expert, and on TPUs
    its kernel wants weights of [E, K, N] and copies all of [E, N, K] first.
    """
    return "reference" if isinstance(grid, tuple) else mosaic(device)


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_ENK: Num[Array, "*L E N K"],
    group_sizes_E: Int[Array, " E"],
    *,
    scale: Float[Array, "..."] | None = None,
    zero: Float[Array, "*L E G N"] | None = None,
    grid: Grid = "int",
    layer: int | Int[Array, ""] | None = None,
    device: Device,
    impl: Impl | None = None,
    tiles: Any = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """Rows times their expert's weights transposed, summed in float32, in x's dtype.

    The first group_sizes_E[0] rows of x are expert 0's, the next ones expert 1's; any size may
    be 0. Rows past the sum, which is at most M, are padding and come out as zeros.

    With a `layer`, weights, scales and zeros are stacked, [L, E, N, K] and so on, and that layer's
    are read where they lie; a slice taken before the call would be a copy.

    x is bfloat16 or float16; float32 too for the reference, and with float weights for
    mosaic_tpu. Scales and zeros are float32 or x's dtype; e4m3's are float32. `impl` None is
    `choose(device)`; a named one never falls back to another. `tiles` overrides the kernel's own
    choice. Raises ValueError, naming the argument, for what does not fit or what `impl` does not
    take.
    """
    if layer is None:
        form, base = check(x_MK, w_ENK, group_sizes_E, scale, zero, grid), jnp.int32(0)
    else:
        checks.check_rank("w_ENK", w_ENK, 4)
        one = lambda a: None if a is None else jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
        form = check(x_MK, one(w_ENK), group_sizes_E, one(scale), one(zero), grid)
        # The layers' experts in one row: a layer's begin at `base`.
        base = jnp.asarray(layer, jnp.int32) * w_ENK.shape[1]
        in_a_row = lambda a: a.reshape(-1, *a.shape[2:])
        w_ENK = in_a_row(w_ENK)
        scale, zero = (None if a is None else in_a_row(a) for a in (scale, zero))
    impl = impl or choose(device, grid)
    checks.check_one_of("impl", impl, IMPLS[:1] if isinstance(grid, tuple) else IMPLS)
    if impl != "reference" and form.kind != "float":
        checks.check_dtype("x_MK", x_MK, ("bfloat16", "float16"))
    if impl == "reference":
        return reference.matmul(x_MK, w_ENK, group_sizes_E, scale, zero, base, grid)
    # Pallas takes a third of a second to import, and the reference needs none of it.
    kernel = import_module(f"pallas_kernels.grouped_matmul.{impl}")
    return kernel.matmul(
        x_MK, w_ENK, group_sizes_E, scale, zero, base, form,
        device=device, tiles=tiles, interpret=interpret,
    )  # fmt: skip


def check(x_MK, w_ENK, group_sizes_E, scale, zero, grid: Grid = "int") -> Form:
    """What the weights are, or a ValueError."""
    checks.check_rank("x_MK", x_MK, 2)
    checks.check_rank("w_ENK", w_ENK, 3)
    E, N, K = w_ENK.shape
    checks.check_shape("x_MK", x_MK, (x_MK.shape[0], K), why="its columns are w_ENK's")
    if min(x_MK.shape[0], E, N, K) == 0:
        raise ValueError(f"x_MK has shape {x_MK.shape} and w_ENK {w_ENK.shape}; no axis may be 0")
    checks.check_shape("group_sizes_E", group_sizes_E, (E,), why="one for each expert of w_ENK")
    checks.check_dtype("group_sizes_E", group_sizes_E, ("int32",))
    checks.check_dtype("x_MK", x_MK, FLOATS)
    checks.check_dtype("w_ENK", w_ENK, (x_MK.dtype, "int8", "int4", "uint4", "float8_e4m3fn"))
    return form_of(x_MK, w_ENK, scale, zero, grid)
