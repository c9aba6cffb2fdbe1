"""Block-scaled FP8 product on Hopper for few tokens: weights are the rows of wgmma (swap-AB).

Bound by the bandwidth of device memory: every weight is read once and used for M <= 64 tokens.
wgmma takes 64 rows of its first operand and any multiple of 8 of its second, so weights go
first and no row is padding. K is cut so that one or two CTAs stand on every multiprocessor, each
with 4 slots of 16 KiB under way: 64 or 128 KiB, where latency times bandwidth asks some 40.
The parts are added by XLA in one fixed order: no atomics, the same bits every time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.checks import check_multiple
from pallas_kernels.devices import Device
from pallas_kernels.fp8_matmul.mosaic_gpu_quantize import quantize
from pallas_kernels.fp8_matmul.reference import BLOCK

HALF = hopper.WARPGROUP_ROWS
TOKENS = 64  # of one CTA at most: two halves' products and sums are 4 x 32 registers a thread


class DecodeTiles(NamedTuple):
    split: int  # parts of K
    stages: int  # slots of 128 of K


def tiles(M: int, N: int, K: int, device: Device) -> DecodeTiles:
    """Two CTAs a multiprocessor where their parts cost little to add up, else one.

    CTAs share bandwidth evenly, so that they need not divide evenly among multiprocessors. A
    part is written once and read once, 8 bytes an element; a 20th of the weights is little.
    """
    across, steps = pl.cdiv(M, TOKENS) * pl.cdiv(N, BLOCK), pl.cdiv(K, BLOCK)
    least = pl.cdiv(device.cores, across) if across < device.cores * 7 // 8 else 1
    little = K // (20 * 8 * M)
    split = min(max(least, min(little, 2 * device.cores // across)), pl.cdiv(steps, 2))
    return DecodeTiles(split, stages=4)


def matmul(x_MK, w_LNK, w_scale_LNG, layer, *, device: Device, choice=None, interpret):
    """y_MN in x's dtype. K % 16 = N % 8 = 0 (TMA's strides)."""
    (M, K), N, dtype = x_MK.shape, w_LNK.shape[1], x_MK.dtype
    check_multiple("K", K, 16, why="the copy engine needs rows of whole 16 bytes")
    check_multiple("N", N, 8, why="the copy engine needs rows of whole 16 bytes")
    split, stages = choice or tiles(M, N, K, device)
    q_MK, scale_GM = quantize(x_MK, interpret=interpret)
    M_tiles, steps = pl.cdiv(M, TOKENS), pl.cdiv(K, BLOCK)
    tokens = pl.cdiv(pl.cdiv(M, M_tiles), 8) * 8
    each = pl.cdiv(steps, split)
    split = pl.cdiv(steps, each)  # none is empty

    def body(x_g, w_g, sx_g, sw_g, layer_g, y_g, x_s, w_s, sx_s, full, *whole):
        m, n, part = (lax.axis_index(a) for a in ("m", "n", "part"))
        layer = layer_g[0]
        begin = part * each
        end = jnp.minimum(begin + each, steps)

        def fetch(k):
            slot = lax.rem(k - begin, stages)
            at_m, at_k = pl.ds(m * tokens, tokens), pl.ds(k * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(
                w_g.at[layer, pl.ds(n * BLOCK, BLOCK), at_k], w_s.at[slot], full.at[slot]
            )
            plgpu.copy_gmem_to_smem(x_g.at[at_m, at_k], x_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(sx_g.at[k, at_m], sx_s.at[slot], full.at[slot])

        @pl.loop(begin, jnp.minimum(begin + stages, end))
        def _(k):
            fetch(k)

        def step(k, carry):
            top, bottom, sw = carry
            slot = lax.rem(k - begin, stages)
            next_sw = sw_g[layer, n, jnp.minimum(k + 1, steps - 1)]  # one step early
            plgpu.barrier_wait(full.at[slot])
            s = plgpu.load(sx_s.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
            # The slot's next scales come by TMA, in another proxy than this load.
            plgpu.commit_smem()

            def product(top, bottom):
                plgpu.wgmma(top, w_s.at[slot, pl.ds(0, HALF)], x_s.at[slot].T)
                plgpu.wgmma(bottom, w_s.at[slot, pl.ds(HALF, HALF)], x_s.at[slot].T)
                return top[...], bottom[...]

            acc = plgpu.WGMMAAccumulatorRef((HALF, tokens), jnp.float32)
            p, q = pl.run_scoped(product, acc, acc)

            @pl.when(k + stages < end)
            def _():
                fetch(k + stages)

            s = lax.broadcast_in_dim(s * sw, p.shape, [1])
            return top + p * s, bottom + q * s, next_sw

        zero = plgpu.layout_cast(jnp.zeros((HALF, tokens), jnp.float32), plgpu.Layout.WGMMA)
        sums = lax.fori_loop(begin, end, step, (zero, zero, sw_g[layer, n, begin]))[:2]
        at_m = pl.ds(m * tokens, tokens)
        if split > 1:
            for half, sum_ in enumerate(sums):
                y_g[part, pl.ds(n * BLOCK + half * HALF, HALF), at_m] = sum_
            return
        (y_s,) = whole
        for half, sum_ in enumerate(sums):
            y = plgpu.layout_cast(sum_.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            y_s.at[:, pl.ds(half * HALF, HALF)].T[...] = y
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_s, y_g.at[at_m, pl.ds(n * BLOCK, BLOCK)])
        plgpu.wait_smem_to_gmem(0)

    fp8 = hopper.swizzled(jnp.float8_e4m3fn, BLOCK)
    N_tiles = pl.cdiv(N, BLOCK)
    if split > 1:
        out = jax.ShapeDtypeStruct((split, N_tiles * BLOCK, M_tiles * tokens), jnp.float32)
        whole = []
    else:
        out = jax.ShapeDtypeStruct((M, N), dtype)
        whole = [plgpu.SMEM((tokens, BLOCK), dtype, transforms=hopper.swizzled(dtype, BLOCK))]
    y = plgpu.kernel(
        body,
        out_type=out,
        grid=(split, N_tiles, M_tiles),
        grid_names=("part", "n", "m"),
        scratch_types=[
            plgpu.SMEM((stages, tokens, BLOCK), jnp.float8_e4m3fn, transforms=fp8),
            plgpu.SMEM((stages, BLOCK, BLOCK), jnp.float8_e4m3fn, transforms=fp8),
            plgpu.SMEM((stages, tokens), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            *whole,
        ],
        interpret=interpret,
    )(q_MK, w_LNK, scale_GM, w_scale_LNG, layer[None])
    return y.sum(0)[:N, :M].T.astype(dtype) if split > 1 else y
