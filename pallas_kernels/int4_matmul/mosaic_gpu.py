"""Matmul with grouped integer weights on Hopper: int4, and int8 through the same kernel.

Output features lie on the 64 rows of wgmma and tokens on its columns, so that a decode step of
8 tokens pads nothing. A warpgroup reads 64 x 128 packed weights from SMEM, widens them in its
registers and passes them to wgmma from there; widened weights exist nowhere else.

Few tokens: bound by reading K*N/2 bytes, and next by widening, some 140 instructions of a warp
per 64 x 128 weights. One warpgroup only copies; up to four others compute, on different rows
(`wgs_n`) or, where N alone would leave SMs idle, on different parts of every stage (`wgs_k`).
A group's product is scaled after its wgmma, in float32: fewer operations than scaling its
weights, and integers are exact in 16 bits. Parts of K are summed in one fixed order, within a
block through SMEM and between blocks (`splits`) by a second pass: the same bits every time.

Many tokens: bound by wgmma. Weights are scaled in registers and all of K adds into one
accumulator. Two warpgroups of 64 x 256 alternate, one widening while the other multiplies;
blocks of a cluster, neighbours in N, load half of an x tile each and share it by multicast.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import check_multiple
from pallas_kernels.devices import Device
from pallas_kernels.grids import Grid, values_by_bits
from pallas_kernels.hopper import (
    ACC,
    WARPGROUP_ROWS,
    accumulate_from_registers,
    mma_from_registers,
    swizzled,
)
from pallas_kernels.int4_matmul import tiles as tiling
from pallas_kernels.int4_matmul.tiles import PRODUCER_REGISTERS, Problem, Tiles, problem_of

SNAKE = 8  # token tiles that blocks running together walk through: their x stays in L2


def matmul(
    x_MK, w_LNK, scale_LGN, zero_LGN, layer_1, *,
    grid: Grid, device: Device, tiles: Tiles | None, interpret,
):  # fmt: skip
    """w is int4 or, with zero, uint4; or int8."""
    (M, K), N = x_MK.shape, w_LNK.shape[1]
    check_multiple("K", K, 64, why="the narrowest swizzle of int4 has 64 columns")
    check_multiple("N", N, WARPGROUP_ROWS, why="a warpgroup multiplies 64 output features")
    problem = problem_of(x_MK, w_LNK, scale_LGN, zero_LGN, grid)
    t = tiles or tiling.best_tiles(problem, device)
    tiling.check(t, problem, device)
    x_MK = jnp.pad(x_MK, ((0, -M % t.tokens), (0, 0)))
    if w_LNK.dtype == jnp.uint4:
        # Only signed integers widen fast: the kernel makes them q - 8, and zeros zero - 8.
        w_LNK = lax.bitcast_convert_type(w_LNK, jnp.int4)
    y = kernel(t, problem, x_MK, w_LNK, scale_LGN, zero_LGN, layer_1, interpret=interpret)
    if t.splits > 1:
        y = y.sum(0).T.astype(x_MK.dtype)
    return y[:M]


def kernel(
    t: Tiles, problem: Problem, x_MK, w_LNK, scale_LGN, zero_LGN, layer_1, *, interpret
):  # fmt: skip
    """y [M, N] in x's dtype, or with splits their [splits, N, M] in float32."""
    (M, K), N, G, dtype = x_MK.shape, w_LNK.shape[1], scale_LGN.shape[1], x_MK.dtype
    operands = [a for a in (x_MK, w_LNK, scale_LGN, zero_LGN) if a is not None]
    is_shifted = problem.zeros and problem.bits == 4
    C, wgs, rows = t.width, t.wgs_n * t.wgs_k, WARPGROUP_ROWS * t.wgs_n
    step_k, scale_rows = tiling.step_k(t), tiling.scale_rows(t, problem)
    epilogue = tiling.epilogue_tokens(t)
    steps, blocks_m, clusters_n = K // step_k, M // t.tokens, N // (rows * t.cluster)
    per_channel, group = G == 1, K // G
    part = min(group, C)  # input features of one scale that are widened at once
    scale_after = t.scale_after and not per_channel
    in_float32 = tiling.in_float32(t, problem)
    scales_weights = tiling.scales_weights(t, problem)
    upcast = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}
    upcast = upcast[jnp.iinfo(w_LNK.dtype).bits]

    def body(*refs):
        x_g, w_g, *sz_g = refs[: len(operands)]
        (
            layer_g,
            o_g,
            x_s,
            w_s,
            sz_s,
            o_s,
            full,
            free,
            once,
            parts_s,
            parts_full,
            acc_s,
            detour_s,
        ) = refs[len(operands) :]
        wg, layer = lax.axis_index("wg"), layer_g[0]
        split, block = jnp.divmod(lax.axis_index("block"), jnp.int32(blocks_m * clusters_n))
        m, n = plgpu.planar_snake(block, (blocks_m, clusters_n), 0, min(SNAKE, blocks_m))
        n = n * t.cluster + lax.axis_index("cluster")
        first = split * steps // t.splits
        count = (split + 1) * steps // t.splits - first
        slot_of = lambda i: lax.rem(i, jnp.int32(t.stages))
        m_rows, n_rows = pl.ds(m * t.tokens, t.tokens), pl.ds(n * rows, rows)

        @pl.when(wg == wgs)
        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            if per_channel:
                for g, s in zip(sz_g, sz_s, strict=True):
                    plgpu.copy_gmem_to_smem(g.at[layer, :, n_rows], s.at[0], once)

            @pl.loop(0, count)
            def _(i):
                slot = slot_of(i)
                bar = full.at[slot]

                @pl.when(i >= t.stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                ks = pl.ds((first + i) * step_k, step_k)
                plgpu.copy_gmem_to_smem(w_g.at[layer, n_rows, ks], w_s.at[slot], bar)
                plgpu.copy_gmem_to_smem(
                    x_g.at[m_rows, ks],
                    x_s.at[slot],
                    bar,
                    collective_axes="cluster" if t.cluster > 1 else None,
                )
                if not per_channel:
                    gs = pl.ds((first + i) * step_k // group, scale_rows)
                    for g, s in zip(sz_g, sz_s, strict=True):
                        plgpu.copy_gmem_to_smem(g.at[layer, gs, n_rows], s.at[slot], bar)

            @pl.loop(jnp.maximum(count - t.stages, 0), count)  # what is in flight at the end
            def _(i):
                plgpu.barrier_wait(free.at[slot_of(i)])

        @pl.when(wg < wgs)
        def compute():
            plgpu.set_max_registers(tiling.compute_registers(wgs), action="increase")
            wk, wn = jnp.divmod(wg, jnp.int32(t.wgs_n))
            wg_rows = pl.ds(wn * WARPGROUP_ROWS, WARPGROUP_ROWS)
            detour = None if detour_s is None else detour_s.at[wg]
            if per_channel:
                plgpu.barrier_wait(once)

            def row_of(ref, slot, g, like):
                """Row g of a stage's scales or zeros, in the dtype of `like`."""
                row = plgpu.load(ref.at[slot, g, wg_rows], layout=plgpu.Layout.WGMMA.reduce(1))
                return row.astype(like.dtype)

            over = lambda row, like: lax.broadcast_in_dim(row, like.shape, [0])

            def dequantize(q, slot, g):
                """bfloat16 integers of group g to what wgmma multiplies."""
                w = q.astype(jnp.float32) if in_float32 else q
                if len(sz_s) == 2:
                    zero = row_of(sz_s[1], slot, g, w)
                    w = w - over(zero - jnp.asarray(8, zero.dtype) if is_shifted else zero, w)
                if scales_weights:
                    w = w * over(row_of(sz_s[0], slot, g, w), w)
                return w.astype(dtype)

            def groups_of(slot, c):
                """(a stage's row of scales, its columns, its dequantised weights), in chunk c."""
                column = (wk * t.chunks + c) * C
                q = plgpu.load(w_s.at[slot, wg_rows, pl.ds(column, C)], layout=upcast)
                if is_shifted:
                    q = q ^ jnp.asarray(-8, q.dtype)
                q = plgpu.layout_cast(q, plgpu.Layout.WGMMA).astype(jnp.bfloat16)
                q = values_by_bits(q, problem.grid)
                for j in range(0, C, part):
                    g = 0 if per_channel else lax.div(column + j, jnp.int32(group))
                    w = dequantize(q[:, j : j + part], 0 if per_channel else slot, g)
                    yield g, pl.ds(column + j, part), w

            def products_then_scale():
                def step(i, acc):
                    slot = slot_of(i)
                    plgpu.barrier_wait(full.at[slot])
                    for c in range(t.chunks):
                        for g, columns, w in groups_of(slot, c):
                            scale = row_of(sz_s[0], slot, g, acc)
                            x = x_s.at[slot, :, columns]
                            p = mma_from_registers(zeros(), w, x.T, detour)
                            acc = acc + p * over(scale, p)
                    plgpu.barrier_arrive(free.at[slot])
                    return acc

                return lax.fori_loop(0, count, step, zeros())

            def scale_then_products():
                def scope(acc_ref):
                    @pl.loop(0, count)
                    def _(i):
                        slot = slot_of(i)
                        plgpu.barrier_wait(full.at[slot])
                        for c in range(t.chunks):
                            column = (wk * t.chunks + c) * C
                            w = [w for _, _, w in groups_of(slot, c)]
                            w = w[0] if len(w) == 1 else jnp.concatenate(w, axis=1)
                            x = x_s.at[slot, :, pl.ds(column, C)]
                            accumulate_from_registers(acc_ref, w, x.T, detour)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])

                    return acc_ref[...]

                if acc_s is None:
                    return pl.run_scoped(scope, ACC((WARPGROUP_ROWS, t.tokens), jnp.float32))
                acc_s[wg] = zeros()
                return scope(acc_s.at[wg])

            def zeros():
                zero = jnp.zeros((WARPGROUP_ROWS, t.tokens), jnp.float32)
                return plgpu.layout_cast(zero, plgpu.Layout.WGMMA)

            def finish(acc):
                for part in range(t.wgs_k - 1):
                    acc = acc + plgpu.load(parts_s.at[part, wg_rows], layout=plgpu.Layout.WGMMA)
                if per_channel:
                    acc = acc * over(row_of(sz_s[0], 0, 0, acc), acc)
                o_rows = pl.ds(n * rows + wn * WARPGROUP_ROWS, WARPGROUP_ROWS)
                if t.splits > 1:
                    o_g[split, o_rows, m_rows] = acc
                    return
                o = o_s.at[wn]
                for first_token in range(0, t.tokens, epilogue):
                    y = acc[:, first_token : first_token + epilogue].astype(dtype)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    tokens = pl.ds(m * t.tokens + first_token, epilogue)
                    plgpu.copy_smem_to_gmem(o, o_g.at[tokens, o_rows])
                plgpu.wait_smem_to_gmem(0)

            acc = products_then_scale() if scale_after else scale_then_products()
            if t.wgs_k == 1:
                finish(acc)
                return

            @pl.when(wk > 0)
            def _():
                parts_s[wk - 1, wg_rows] = acc
                plgpu.barrier_arrive(parts_full)

            @pl.when(wk == 0)
            def _():
                plgpu.barrier_wait(parts_full)
                finish(acc)

    S = plgpu.SMEM
    x_tile, w_tile = swizzled(dtype, min(part, 64)), swizzled(w_LNK.dtype, C)
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=t.stages)
    if t.cluster > 1:  # a slot is free when all blocks that x goes to have left it
        free = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=wgs, num_barriers=t.stages
        )
    scratch = (
        S((t.stages, t.tokens, step_k), dtype, transforms=x_tile),
        S((t.stages, rows, step_k), w_LNK.dtype, transforms=w_tile),
        [S((1 if per_channel else t.stages, scale_rows, rows), a.dtype) for a in operands[2:]],
        S((t.wgs_n, epilogue, WARPGROUP_ROWS), dtype, transforms=swizzled(dtype, 64)),
        plgpu.Barrier(num_arrivals=2 if per_channel else len(operands), num_barriers=t.stages),
        free,
        plgpu.Barrier(num_arrivals=len(operands) - 2) if per_channel else None,
        S((t.wgs_k - 1, rows, t.tokens), jnp.float32) if t.wgs_k > 1 else None,
        plgpu.Barrier(num_arrivals=t.wgs_n * (t.wgs_k - 1)) if t.wgs_k > 1 else None,
        S((wgs, WARPGROUP_ROWS, t.tokens), jnp.float32) if interpret else None,
        S((wgs, WARPGROUP_ROWS, part if scale_after else C), dtype) if interpret else None,
    )
    out = (M, N), dtype
    if t.splits > 1:
        out = (t.splits, N, M), jnp.float32
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(*out),
        scratch_types=scratch,
        grid=(t.splits * blocks_m * clusters_n,),
        grid_names=("block",),
        cluster=(t.cluster,),
        cluster_names=("cluster",),
        num_threads=wgs + 1,
        thread_name="wg",
        interpret=interpret or None,
    )(*operands, layer_1)
