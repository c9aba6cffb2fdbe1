"""What the Mosaic GPU kernels share: SMEM layouts for wgmma and the interpreter's detours."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage] (jax exports it under another name)
WARPGROUP_ROWS = 64  # rows of one wgmma


def swizzled(dtype, columns: int) -> tuple:
    """The layout of a tile that TMA writes and wgmma reads: 8 rows of one swizzle, the widest
    (32, 64 or 128 bytes) that `columns` divides into."""
    bits = jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).bits
    for swizzle in (128, 64, 32):
        width = swizzle * 8 // bits
        if columns % width == 0:
            tiles = plgpu.TilingTransform((8, width))  # pyright: ignore[reportAbstractUsage]
            return tiles, plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]
    raise ValueError(f"columns is {columns}; it must be a multiple of {width} for {dtype}")


def mma_from_registers(acc, a, b, detour=None) -> Any:
    """acc + a @ b, a in registers. The interpreter knows neither register operands nor ACC.init,
    so while interpreting `a` goes through `detour`, an SMEM scratch of its shape and dtype."""
    if detour is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(ACC.init(acc))
    detour[...] = a
    plgpu.commit_smem()

    def product(ref):
        plgpu.wgmma(ref, detour, b)
        return ref[...]

    return acc + pl.run_scoped(product, ACC(acc.shape, jnp.float32))


def accumulate_from_registers(acc_ref, a, b, detour=None):
    """Issues acc_ref += a @ b, a in registers, and does not wait. While interpreting, acc_ref is
    an SMEM array instead of an ACC, since the interpreter knows no store to one."""
    if detour is None:
        plgpu.wgmma(acc_ref, a, b)
    else:
        acc_ref[...] = mma_from_registers(acc_ref[...], a, b, detour)
