"""Rounding of activations to e4m3 with a scale for each 1x128, in one launch.

Bound by the bandwidth of device memory: 3 bytes an element. XLA takes three kernels (the
largest values, the scales, the rounding) and reads x twice, which for few tokens costs as much
in launches as a tenth of the product. The scales are written as the products' TMA reads them,
a row for each 128 of K.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.fp8_matmul.reference import BLOCK, round_to_e4m3, scale_of

ROWS = hopper.WARPGROUP_ROWS


def quantize(x_MK, *, interpret):
    """q_MK, and scale_GM with M rounded up to a multiple of 64. K % 16 = 0 (TMA's strides)."""
    M, K = x_MK.shape
    M_tiles, blocks = pl.cdiv(M, ROWS), pl.cdiv(K, BLOCK)

    def body(x_g, q_g, scale_g, x_s, q_s, loaded):
        m, k = lax.axis_index("m") * ROWS, lax.axis_index("k")
        tile = pl.ds(m, ROWS), pl.ds(k * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(x_g.at[tile], x_s, loaded)
        plgpu.barrier_wait(loaded)
        x = plgpu.load(x_s, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        s = scale_of(jnp.max(jnp.abs(x), axis=1))
        scale_g[k, pl.ds(m, ROWS)] = s
        q_s[...] = round_to_e4m3(x / lax.broadcast_in_dim(s, x.shape, [0]))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, q_g.at[tile])
        plgpu.wait_smem_to_gmem(0)

    fp8 = jnp.float8_e4m3fn
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((M, K), fp8),
            jax.ShapeDtypeStruct((blocks, M_tiles * ROWS), jnp.float32),
        ),
        grid=(M_tiles, blocks),
        grid_names=("m", "k"),
        scratch_types=[
            plgpu.SMEM((ROWS, BLOCK), x_MK.dtype, transforms=hopper.swizzled(x_MK.dtype, BLOCK)),
            plgpu.SMEM((ROWS, BLOCK), fp8, transforms=hopper.swizzled(fp8, BLOCK)),
            plgpu.Barrier(),
        ],
        interpret=interpret,
    )(x_MK)
