"""Block-scaled FP8 product on Hopper: x[M, K] e4m3 (1x128 scales) by w[N, K] e4m3 (128x128).

QGMMA sums 128 of K in the tensor core; a register accumulator in float32 then takes the sum
times both scales (the promotion), because the scales change there and because the tensor core
itself keeps few bits of an fp8 sum.

Bound by the tensor cores: a 256x128x128 step is 1024 cycles of QGMMA, and asks for 48 KiB of L2
in that time, 32 KiB when two CTAs share x's tile by multicast. Hence:

    producer warpgroup   TMA into `stages` slots, never waits for arithmetic
    2 compute warpgroups 64 or 128 rows each, in halves of 64 rows x 128 columns: a half's
                         product and its sum are 64 + 64 registers a thread; two whole
                         64x256 ones would spill. While one promotes, the other multiplies.
    persistent CTAs      the producer fetches the next tile while this one is written
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.checks import check_multiple, check_one_of
from pallas_kernels.devices import Device
from pallas_kernels.fp8_matmul.mosaic_gpu_quantize import quantize
from pallas_kernels.fp8_matmul.reference import BLOCK

COMPUTE = 2  # warpgroups that multiply; one more fetches
HALF = hopper.WARPGROUP_ROWS
STORE = 64  # columns of y written at once by a warpgroup


class Tiles(NamedTuple):
    rows: int  # of x in a CTA: 128 or 256
    stages: int  # slots of 128 of K
    cluster: int  # CTAs, side by side in N, that share x's tile: 1 or 2
    width: int  # tiles of M that are visited together, so that w's tiles stay in L2


def tiles(M: int, N: int, device: Device) -> Tiles:
    """The rows whose last wave wastes least; a CTA of 256 rows is faster for equal work."""
    columns = pl.cdiv(N, BLOCK)

    def cost(rows):
        waves = pl.cdiv(pl.cdiv(M, rows) * columns, device.cores)
        return waves * rows * (1.15 if rows == 128 else 1.0)

    rows = min((256, 128), key=cost)
    return Tiles(rows, stages=4 if rows == 256 else 6, cluster=2 - columns % 2, width=8)


def matmul(x_MK, w_LNK, w_scale_LNG, layer, *, device: Device, choice=None, interpret):
    """y_MN in x's dtype. K % 16 = N % 8 = 0 (TMA's strides)."""
    (M, K), N, dtype = x_MK.shape, w_LNK.shape[1], x_MK.dtype
    check_multiple("K", K, 16, why="the copy engine needs rows of whole 16 bytes")
    check_multiple("N", N, 8, why="the copy engine needs rows of whole 16 bytes")
    rows, stages, cluster, width = choice or tiles(M, N, device)
    check_one_of("tiles.rows", rows, (COMPUTE * HALF, 2 * COMPUTE * HALF))
    check_one_of("tiles.cluster", cluster, (1, 2))
    q_MK, scale_GM = quantize(x_MK, interpret=interpret)
    halves = rows // COMPUTE // HALF
    M_tiles, N_tiles, steps = pl.cdiv(M, rows), pl.cdiv(N, BLOCK * cluster), pl.cdiv(K, BLOCK)
    total = M_tiles * N_tiles
    clusters = min(device.cores // cluster, total)

    def body(x_g, w_g, sx_g, sw_g, layer_g, y_g, x_s, w_s, sx_s, y_s, full, empty):
        wg, first = lax.axis_index("wg"), lax.axis_index("cta")
        mine, layer = pl.cdiv(total - first, clusters), layer_g[0]

        def place(i):
            """The first row and column of this CTA's i-th tile."""
            m, n = plgpu.planar_snake(first + i * clusters, (M_tiles, N_tiles), 0, width)
            if cluster > 1:
                n = n * cluster + lax.axis_index("cluster")
            return m * rows, n * BLOCK

        @pl.when(wg == COMPUTE)
        def fetch():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, mine)
            def _(i):
                m, n = place(i)

                @pl.loop(0, steps)
                def _(k):
                    step = i * steps + k
                    slot = lax.rem(step, stages)

                    @pl.when(step >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    at_k = pl.ds(k * BLOCK, BLOCK)
                    plgpu.copy_gmem_to_smem(
                        x_g.at[pl.ds(m, rows), at_k], x_s.at[slot], full.at[slot],
                        collective_axes="cluster" if cluster > 1 else None,
                    )  # fmt: skip
                    plgpu.copy_gmem_to_smem(
                        w_g.at[layer, pl.ds(n, BLOCK), at_k], w_s.at[slot], full.at[slot]
                    )
                    plgpu.copy_gmem_to_smem(
                        sx_g.at[k, pl.ds(m, rows)], sx_s.at[slot], full.at[slot]
                    )

            # No CTA leaves while another of its cluster may still write to its memory.
            @pl.loop(jnp.maximum(mine * steps - stages, 0), mine * steps)
            def _(step):
                plgpu.barrier_wait(empty.at[lax.rem(step, stages)])

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(208, action="increase")
            zero = plgpu.layout_cast(jnp.zeros((HALF, BLOCK), jnp.float32), plgpu.Layout.WGMMA)

            @pl.loop(0, mine)
            def _(i):
                m, n = place(i)
                block = jnp.minimum(n // BLOCK, w_scale_LNG.shape[1] - 1)

                def step(k, carry):
                    sums, sw = carry
                    slot = lax.rem(i * steps + k, stages)
                    # One step early: it comes from device memory.
                    next_sw = sw_g[layer, block, jnp.minimum(k + 1, steps - 1)]
                    plgpu.barrier_wait(full.at[slot])
                    rows_of = [pl.ds((wg * halves + half) * HALF, HALF) for half in range(halves)]
                    row = plgpu.Layout.WGMMA.reduce(1)
                    s = [plgpu.load(sx_s.at[slot, part], layout=row) * sw for part in rows_of]
                    # The slot's next scales come by TMA, in another proxy than these loads.
                    plgpu.commit_smem()
                    out = []
                    for half, part in enumerate(rows_of):

                        def product(acc, part=part):
                            plgpu.wgmma(acc, x_s.at[slot, part], w_s.at[slot].T)
                            return acc[...]

                        p = pl.run_scoped(
                            product, plgpu.WGMMAAccumulatorRef((HALF, BLOCK), jnp.float32)
                        )
                        if half == halves - 1:
                            plgpu.barrier_arrive(empty.at[slot])
                        out.append(sums[half] + p * lax.broadcast_in_dim(s[half], p.shape, [0]))
                    return tuple(out), next_sw

                sums, _ = lax.fori_loop(0, steps, step, ((zero,) * halves, sw_g[layer, block, 0]))
                for half, sum_ in enumerate(sums):
                    for at in range(0, BLOCK, STORE):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        y_s[wg] = sum_[:, at : at + STORE].astype(dtype)
                        plgpu.commit_smem()
                        to = pl.ds(m + (wg * halves + half) * HALF, HALF), pl.ds(n + at, STORE)
                        plgpu.copy_smem_to_gmem(y_s.at[wg], y_g.at[to])

            plgpu.wait_smem_to_gmem(0)

    fp8 = hopper.swizzled(jnp.float8_e4m3fn, BLOCK)
    emptied = {"num_arrivals": COMPUTE, "num_barriers": stages}
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(clusters,),
        grid_names=("cta",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((stages, rows, BLOCK), jnp.float8_e4m3fn, transforms=fp8),
            plgpu.SMEM((stages, BLOCK, BLOCK), jnp.float8_e4m3fn, transforms=fp8),
            plgpu.SMEM((stages, rows), jnp.float32),
            plgpu.SMEM((COMPUTE, HALF, STORE), dtype, transforms=hopper.swizzled(dtype, STORE)),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("cluster",), **emptied)
            if cluster > 1
            else plgpu.Barrier(**emptied),
        ],
        interpret=interpret,
        **({"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}),
    )
    return run(q_MK, w_LNK, scale_GM, w_scale_LNG, layer[None])
