"""Product of activations with FP8 weights under the scales that checkpoints have.

M tokens   K inputs   N outputs   G groups of K under one scale   L layers of stacked weights
"""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Int

from pallas_kernels.checks import check_dtype, check_one_of, check_rank, check_shape
from pallas_kernels.devices import Device, Impl, mosaic
from pallas_kernels.fp8_matmul import (
    mosaic_gpu,
    mosaic_gpu_decode,
    mosaic_tpu,
    reference,
    xla,
)
from pallas_kernels.fp8_matmul.mosaic_gpu_decode import DecodeTiles
from pallas_kernels.fp8_matmul.reference import BLOCK, quantize_tokens
from pallas_kernels.tuning import key, tuned, up_to

__all__ = ["choose", "fp8_matmul", "quantize_tokens"]

Tiles = mosaic_gpu.Tiles | DecodeTiles | mosaic_tpu.Tiles
Activations = Literal["e4m3", "float"]


def choose(
    device: Device, *, N: int, K: int, blocks: bool, activations: Activations = "e4m3"
) -> Impl:
    """What runs [N, K] weights there; `blocks` says that they have 128x128 scales.

    The copy engine of a GPU needs K % 16 = 0 and N % 8 = 0; the reference takes the rest, which
    no published checkpoint has.
    """
    if device.platform == "cpu":
        return "reference"
    if not blocks or activations == "float":
        return "xla"
    if device.platform == "cuda" and (K % 16 or N % 8):
        return "reference"
    return mosaic(device)


def fp8_matmul(
    x_MK: Float[Array, "M K"],
    w_NK: Float8e4m3fn[Array, "*L N K"],
    w_scale: Float[Array, "..."],
    *,
    x_scale: Float[Array, "*L"] | None = None,
    activations: Activations = "e4m3",
    layer: int | Int[Array, ""] | None = None,
    device: Device,
    impl: Impl | None = None,
    interpret: Any = False,
    tiles: Tiles | None = None,
) -> Float[Array, "M N"]:
    """x·wᵀ in x's dtype, from x rounded to e4m3 and summed in float32. x is bfloat16 or float16,
    or float32 for the reference.

    With `activations` "float" x is taken as it is, and weights, which stay e4m3 in device memory,
    are widened by XLA: within the product on TPUs, into a copy of this one matrix on GPUs and,
    scaled, everywhere under block scales.

    `w_scale`, float32, is one of
        []                          of the whole tensor
        [N]                         of each output channel
        [ceil(N/128), ceil(K/128)]  of blocks of 128x128, the last ones partial
    and says how x is rounded: `quantize_tokens` by token, or by token and 128 of K under block
    scales. A checkpoint with one scale for x too, `x_scale`, has a whole-tensor `w_scale`.

    With a `layer`, w_NK and the scales are stacked: [L, N, K] and so on. A kernel reads that
    layer where it lies; a slice taken before the call would be a copy.

    `tiles` overrides the tile choice of a Mosaic implementation. ValueError names the argument
    that is wrong. A named `impl` never falls back to another.
    """
    check_one_of("activations", activations, ("e4m3", "float"))
    check_rank("x_MK", x_MK, 2)
    check_rank("w_NK", w_NK, 2 if layer is None else 3)
    (M, K), N = x_MK.shape, w_NK.shape[-2]
    stack = w_NK.shape[:-2]
    check_dtype("x_MK", x_MK, ("bfloat16", "float16", "float32"))
    check_dtype("w_NK", w_NK, ("float8_e4m3fn",))
    check_shape("w_NK", w_NK, (*stack, N, K), why="x_MK has K inputs")
    check_dtype("w_scale", w_scale, ("float32",))
    scale_ndim = w_scale.ndim - len(stack)
    check_one_of("w_scale.ndim", w_scale.ndim, [len(stack) + n for n in range(3)])
    shape = ((), (N,), (-(-N // BLOCK), -(-K // BLOCK)))[scale_ndim]
    why = "one scale a tensor, a channel or a 128x128 block"
    check_shape("w_scale", w_scale, (*stack, *shape), why=why)
    if x_scale is not None:
        check_dtype("x_scale", x_scale, ("float32",))
        if activations == "float":
            raise ValueError("x_scale is given with activations 'float'; it must be None")
        check_shape("x_scale", x_scale, stack, why="it is one number for the whole tensor")
        if scale_ndim:
            raise ValueError(
                f"x_scale is given with w_scale of shape {w_scale.shape}; it must be None: only "
                "weights with one scale have activations with one"
            )
    blocks = scale_ndim == 2
    impl = impl or choose(device, N=N, K=K, blocks=blocks, activations=activations)
    by_xla = activations == "float" or not blocks
    check_one_of("impl", impl, ("reference", "xla" if by_xla else mosaic(device)))
    if impl in ("reference", "xla"):
        if layer is not None:
            w_NK, w_scale = w_NK[layer], w_scale[layer]
            x_scale = None if x_scale is None else x_scale[layer]
        by = reference if impl == "reference" else xla
        if activations == "float":
            return by.float_activations(x_MK, w_NK, w_scale)
        return by.matmul(x_MK, w_NK, w_scale, x_scale)
    check_dtype("x_MK", x_MK, ("bfloat16", "float16"))
    if layer is None:
        w_NK, w_scale = w_NK[None], w_scale[None]
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    tiles = tiles or best_tiles(M, N, K, x_MK.dtype, device)
    few = mosaic_gpu_decode if isinstance(tiles, DecodeTiles) else mosaic_gpu
    kernel = mosaic_tpu if impl == "mosaic_tpu" else few
    return kernel.matmul(
        x_MK, w_NK, w_scale, layer, device=device, choice=tiles, interpret=interpret
    )


def tuning_key(M: int, N: int, K: int, dtype: Any) -> str:
    return key(M=up_to(M), N=N, K=K, x=jnp.dtype(dtype).name)


def best_tiles(M: int, N: int, K: int, dtype: Any, device: Device) -> Tiles:
    """Of the device's kernel for weights with block scales: those measured fastest, else what
    seems so."""
    name = tuning_key(M, N, K, dtype)
    if device.platform == "tpu":
        measured = tuned("fp8_matmul", device, name, mosaic_tpu.Tiles)
        if measured is None:
            return mosaic_tpu.tiles(M, N, K, device)
        return measured._replace(M=min(M, measured.M))  # no higher than x
    measured = tuned("fp8_matmul", device, name, mosaic_gpu.Tiles, DecodeTiles)
    if measured is not None:
        return measured
    if _few(M, N, device):
        return mosaic_gpu_decode.tiles(M, N, K, device)
    return mosaic_gpu.tiles(M, N, device)


def _few(M: int, N: int, device: Device) -> bool:
    """Whether weights should go first and K be cut: few tokens, or too few tiles for the chip."""
    return M <= 64 or (M <= 512 and -(-M // 128) * -(-N // 128) < device.cores // 2)
