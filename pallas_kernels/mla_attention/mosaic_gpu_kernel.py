"""The kernel of latent attention on Hopper; mosaic_gpu.py says what bounds it and why it is so."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.mla_attention import mosaic_gpu_schedule as schedule

PAGE = 64  # tokens; the rows of one tile
ROWS = hopper.WARPGROUP_ROWS
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
# The rows' largest scores so far, after the even page and after the odd one; each warpgroup's share
# of the softmax's denominator; and the denominator's log2.
EVEN, ODD = 0, 1  # pages, and the warpgroups that compute their scores
EVEN_PEAK, ODD_PEAK, EVEN_SUM, ODD_SUM, LSE = range(5)
# Barriers: each half of each of two pages is full, or free to be written; q may be written; the
# even page's peak, either page's probabilities, either warpgroup's sum are there.
LEFT_FULL, RIGHT_FULL, LEFT_FREE, RIGHT_FREE = 0, 2, 4, 6
Q_FREE, EVEN_MAX, EVEN_READY, ODD_READY, SUM_READY = 8, 9, 10, 11, 12
MASKED = -1e30  # finite: the difference of two of them must not be nan


class Scratch(NamedTuple):
    """Of one block. TMA fills whole arrays, so that halves of a tile are two arrays."""

    q: Any  # latent part of q, by halves; after the last page, the output on its way out
    left: Any  # two pages' columns up to C/2
    right: Any  # and the rest
    p: Any  # probabilities of the even page and of the odd one; before the first odd one, its
    # place holds the rope part of q
    vectors: Any  # of one number for each row: EVEN_PEAK and so on
    q_full: Any  # barrier: q is there
    barriers: Any  # all others, Q_FREE and so on, in one array: their phases share a register
    detours: Any  # only while interpreting


def scratch(C: int, D: int, dtype, queries: int, interpreting: bool) -> Scratch:
    tile = lambda *shape, dtype=dtype: plgpu.SMEM(
        shape, dtype, transforms=hopper.swizzled(dtype, shape[-1])
    )
    return Scratch(
        q=plgpu.RefUnion(tile(2, ROWS, C // 2), tile(2, ROWS, C // 4, dtype=jnp.float32)),
        left=tile(2, PAGE, C // 2), right=tile(2, PAGE, D - C // 2),
        p=tile(2, ROWS, PAGE),
        vectors=plgpu.SMEM((5, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=3 * queries),
        barriers=plgpu.Barrier(num_barriers=14),
        detours=(tile(ROWS, PAGE),) * 4 if interpreting else (),
    )  # fmt: skip


def body(
    q_g, rope_g, kv_g, layer_g, pages_g, units_g, first_g, o_g, o_part_g, lse_part_g, *,
    s: Scratch, heads: int, queries: int, scale_log2: float,
):  # fmt: skip
    C = q_g.shape[1]
    half = C // 2
    head, part, wg = (lax.axis_index(a) for a in ("head", "part", "wg"))
    q_s, stage_s = s.q
    rope_s = s.p.at[ODD]
    group = min(heads, ROWS)  # rows of one query
    sides = (  # of a page: its SMEM, whether that is full or free, its columns
        (s.left, LEFT_FULL, LEFT_FREE, pl.ds(0, half)),
        (s.right, RIGHT_FULL, RIGHT_FREE, pl.ds(half, kv_g.shape[3] - half)),
    )
    wait = lambda index: plgpu.barrier_wait(s.barriers.at[index])
    arrive = lambda index: plgpu.barrier_arrive(s.barriers.at[index])
    columns_of = lambda side: pl.ds(side * half, half)

    def unit(u) -> Any:
        return schedule.Units(*(units_g[f, u] for f in range(7)))

    def each_unit(do):
        pl.loop(first_g[part], first_g[part + 1])(do)

    def rows_of(seg: schedule.Units, n: int):
        """Where query n of the tile lies; past the last one, the last one again."""
        token = seg.token_U + jnp.minimum(n, jnp.maximum(seg.queries_U, 1) - 1)
        return pl.ds(token * heads + head * ROWS, group)

    @pl.when(wg == 2)
    def load_pages():
        plgpu.set_max_registers(24, action="decrease")
        layer = layer_g[0]

        @each_unit
        def _(u):
            seg = unit(u)

            @pl.loop(seg.begin_U, seg.end_U)
            def _(i):
                page, slot = pages_g[seg.row_U, i], lax.rem(i, 2)
                for to, full, free, columns in sides:
                    wait(free + slot)
                    plgpu.copy_gmem_to_smem(
                        kv_g.at[layer, page, :, columns], to.at[slot], s.barriers.at[full + slot]
                    )

        for slot in (0, 1):  # what the last pages' readers said
            wait(LEFT_FREE + slot)
            wait(RIGHT_FREE + slot)

    def late(index: int, i):
        """`index`, but in a way that depends on the loop: the addresses of a hundred tiles would
        otherwise be computed before it and spilled. i, a page of a sequence, is below 2^24."""
        return index + lax.shift_right_logical(i, 24)

    def scores(slot: int, rope, detour, seg: schedule.Units, i):
        """Of the page in `slot`, which is page i of the sequence: masked, not yet scaled."""

        def product(acc):
            # In the order in which they are freed, and so come.
            for side in (0, 1) if slot == 0 else (1, 0):
                keys, full, _, _ = sides[side]
                wait(full + slot)
                keys_s = keys.at[late(slot, i), :, pl.ds(0, half)]
                plgpu.wgmma(acc, q_s.at[late(side, i)], keys_s.T)
            rope_keys = s.right.at[late(slot, i), :, pl.ds(half, ROWS)].T
            plgpu.wgmma(acc, rope if detour is None else detour, rope_keys)
            return acc[...]

        x = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, PAGE), jnp.float32))
        iota = lambda axis: plgpu.broadcasted_iota(
            jnp.int32, x.shape, axis, layout=plgpu.Layout.WGMMA
        )
        query = iota(0) // group if queries > 1 else 0
        return jnp.where(iota(1) - query < seg.seen_U - i * PAGE, x, MASKED)

    def product(acc, a, slot: int, side: int, i) -> Any:
        """acc + a @ one side of the values of the page in `slot`, which is page i or its pair."""

        def f(ref):
            plgpu.wgmma(ref, a, sides[side][0].at[late(slot, i), :, pl.ds(0, half)])

        if s.detours:
            return acc + pl.run_scoped(
                lambda ref: (f(ref), ref[...])[1],
                plgpu.WGMMAAccumulatorRef((ROWS, half), jnp.float32),
            )
        return pl.run_state(f)(plgpu.WGMMAAccumulatorRef.init(acc))

    def rows(value):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW_LAYOUT)

    def load_rows(ref):
        return plgpu.load(ref, layout=ROW_LAYOUT)

    def wide(x_m, columns):
        return lax.broadcast_in_dim(x_m, (ROWS, columns), [0])

    def softmax(x, peak):
        """(probabilities, relative to the new peak)."""
        new = jnp.maximum(peak, x.max(axis=1) * scale_log2)
        return jnp.exp2(x * scale_log2 - wide(new, PAGE)), new

    def store(u, acc, peak, total, index: int):
        """Normalise by both warpgroups' totals, and write this one's half."""
        seg = unit(u)  # read again: registers are dear while pages are read
        s.vectors.at[EVEN_SUM + index][...] = total
        arrive(SUM_READY + index)
        wait(SUM_READY + 1 - index)
        total = total + load_rows(s.vectors.at[ODD_SUM - index])
        acc = acc * wide(jnp.where(total > 0, 1 / jnp.maximum(total, 1e-30), 0), half)

        @pl.when(seg.alone_U == 1)
        def _():
            q_s.at[index][...] = acc.astype(q_s.dtype)
            plgpu.commit_smem()
            for n in range(queries):

                @pl.when(n < seg.queries_U)
                def _(n=n):
                    plgpu.copy_smem_to_gmem(
                        q_s.at[index, pl.ds(n * group, group)],
                        o_g.at[rows_of(seg, n), columns_of(index)],
                    )

            plgpu.wait_smem_to_gmem(0)

        @pl.when(seg.alone_U == 0)
        def _():
            for k in (0, 1):
                quarter = C // 4
                stage_s.at[index][...] = acc[:, k * quarter : (k + 1) * quarter]
                plgpu.commit_smem()
                to = o_part_g.at[u, head, :, pl.ds(index * half + k * quarter, quarter)]
                for n in range(queries):

                    @pl.when(n < seg.queries_U)
                    def _(n=n, to=to):
                        some = pl.ds(n * group, group)
                        plgpu.copy_smem_to_gmem(stage_s.at[index, some], to.at[some])

                plgpu.wait_smem_to_gmem(0)
            if index == 0:
                s.vectors.at[LSE][...] = peak + jnp.log2(jnp.maximum(total, 1e-30))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(s.vectors.at[LSE], lse_part_g.at[u, head])
                plgpu.wait_smem_to_gmem(0)

    zero = lambda: plgpu.layout_cast(jnp.zeros((ROWS, half), jnp.float32), plgpu.Layout.WGMMA)

    def load_rope(index: int):
        """The rope part of q goes to registers, and leaves its SMEM to the odd probabilities."""
        plgpu.barrier_wait(s.q_full)
        rope = plgpu.load(rope_s, layout=plgpu.Layout.WGMMA)
        if s.detours:
            s.detours[index][...] = rope
            plgpu.commit_smem()
            return rope, s.detours[index], s.detours[2 + index]
        return rope, None, None

    def from_registers(acc, p, slot: int, side: int, i, detour):
        if detour is not None:
            detour[...] = p
            plgpu.commit_smem()
            p = detour
        return product(acc, p, slot, side, i)

    @pl.when(wg == 0)
    def even_pages():
        plgpu.set_max_registers(240, action="increase")
        for slot in (0, 1):
            arrive(LEFT_FREE + slot)

        @each_unit
        def _(u):
            seg = unit(u)
            wait(Q_FREE)
            for n in range(queries):
                rows_n = pl.ds(n * group, group)
                for side in (0, 1):
                    plgpu.copy_gmem_to_smem(
                        q_g.at[rows_of(seg, n), columns_of(side)], q_s.at[side, rows_n], s.q_full
                    )
                plgpu.copy_gmem_to_smem(rope_g.at[rows_of(seg, n)], rope_s.at[rows_n], s.q_full)
            rope, rope_detour, detour = load_rope(0)

            def pair(j, carry):
                acc, old, total = carry
                i = 2 * j
                p, peak = softmax(scores(0, rope, rope_detour, seg, i), old)
                s.vectors.at[EVEN_PEAK][...] = peak
                arrive(EVEN_MAX)
                shrink = jnp.exp2(old - peak)
                total = total * shrink + p.sum(axis=1)
                p = p.astype(q_s.dtype)  # half the registers until the other's peak is there
                acc = from_registers(acc * wide(shrink, half), p, 0, 0, i, detour)
                arrive(LEFT_FREE + 0)
                wait(ODD_READY)
                odd_peak = load_rows(s.vectors.at[ODD_PEAK])
                shrink = jnp.exp2(peak - odd_peak)
                p = p.astype(jnp.float32) * wide(shrink, PAGE)
                s.p.at[EVEN][...] = p.astype(q_s.dtype)
                plgpu.commit_smem()
                arrive(EVEN_READY)
                wait(LEFT_FULL + 1)
                acc = product(acc * wide(shrink, half), s.p.at[late(ODD, i)], 1, 0, i)
                arrive(LEFT_FREE + 1)
                return acc, odd_peak, total * shrink

            def single(i, carry):
                acc, old, total = carry
                p, peak = softmax(scores(0, rope, rope_detour, seg, i), old)
                s.vectors.at[EVEN_PEAK][...] = peak
                s.p.at[EVEN][...] = p.astype(q_s.dtype)
                plgpu.commit_smem()
                arrive(EVEN_READY)
                shrink = jnp.exp2(old - peak)
                total = total * shrink + p.sum(axis=1)
                acc = product(acc * wide(shrink, half), s.p.at[late(EVEN, i)], 0, 0, i)
                arrive(LEFT_FREE + 0)
                return acc, peak, total

            carry: Any = zero(), rows(MASKED), rows(0.0)
            carry = lax.fori_loop(seg.begin_U // 2, seg.end_U // 2, pair, carry)
            carry = lax.fori_loop(seg.end_U // 2 * 2, seg.end_U, single, carry)
            acc, peak, total = carry
            store(u, acc, peak, total, 0)

        wait(Q_FREE)

    @pl.when(wg == 1)
    def odd_pages():
        plgpu.set_max_registers(240, action="increase")
        for slot in (0, 1):
            arrive(RIGHT_FREE + slot)
        arrive(Q_FREE)

        @each_unit
        def _(u):
            seg = unit(u)
            rope, rope_detour, detour = load_rope(1)

            def pair(j, carry):
                acc, old, total = carry
                i = 2 * j + 1
                x = scores(1, rope, rope_detour, seg, i)
                wait(EVEN_MAX)
                p, peak = softmax(x, load_rows(s.vectors.at[EVEN_PEAK]))
                total_p = p.sum(axis=1)
                p = p.astype(q_s.dtype)
                s.p.at[ODD][...] = p
                s.vectors.at[ODD_PEAK][...] = peak
                plgpu.commit_smem()
                arrive(ODD_READY)
                shrink = jnp.exp2(old - peak)  # from before the even page
                acc = from_registers(acc * wide(shrink, half), p, 1, 1, i, detour)
                arrive(RIGHT_FREE + 1)
                wait(RIGHT_FULL + 0)
                wait(EVEN_READY)
                acc = product(acc, s.p.at[late(EVEN, i)], 0, 1, i)
                arrive(RIGHT_FREE + 0)
                return acc, peak, total * shrink + total_p

            def single(i, carry):
                acc, old, total = carry
                wait(RIGHT_FULL + 0)
                wait(EVEN_READY)
                peak = load_rows(s.vectors.at[EVEN_PEAK])
                shrink = jnp.exp2(old - peak)
                acc = product(acc * wide(shrink, half), s.p.at[late(EVEN, i)], 0, 1, i)
                arrive(RIGHT_FREE + 0)
                return acc, peak, total * shrink

            carry: Any = zero(), rows(MASKED), rows(0.0)
            carry = lax.fori_loop(seg.begin_U // 2, seg.end_U // 2, pair, carry)
            carry = lax.fori_loop(seg.end_U // 2 * 2, seg.end_U, single, carry)
            acc, peak, total = carry
            store(u, acc, peak, total, 1)
            arrive(Q_FREE)
