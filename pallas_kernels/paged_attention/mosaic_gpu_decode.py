"""Decode attention on Hopper: rows with one query each.

It reads every cached key and value once and computes G products with it, so memory bandwidth is
the bound, and all SMs must stream pages all the time whatever the rows' lengths are:

- Each row and kv head is cut into chunks of its blocks, and the list of all chunks into shares of
  equally many blocks, one a worker (a thread block). Nobody waits for a long row, a single row
  fills the chip, and short rows leave no gaps: the fetching warpgroup runs ahead across their
  borders. Where a row is cut depends on static shapes and its own length alone, so its bits do not
  depend on its neighbours; which worker computes a chunk may.
- A chunk leaves a partial result (o, m, l), which a second kernel merges.
- Keys lie on wgmma's 64-row side and the G queries on its narrow one, so a group of 4 costs 8
  columns, not 64 rows: S^T = K Q^T, then O^T += V^T P^T, with P^T passed through 1 KB of SMEM.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ACC, swizzled
from pallas_kernels.paged_attention.layout import Ragged
from pallas_kernels.paged_attention.mosaic_gpu_blocks import (
    INT,
    LOWEST,
    MASKED,
    Ring,
    block_pages,
    capped,
    compute_dtype,
    fetch,
    filled,
    finish,
    product,
)
from pallas_kernels.reach import oldest

LEAST_CHUNK = 4  # blocks: less is not worth a merge
LARGE_CHUNK = 16  # blocks: a merge costs little, and workers' shares differ by at most this
PARTIAL_BYTES = 64 * 2**20  # of partial results, which caps the chunks of a long row
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number for each query


class DecodeTiles(NamedTuple):
    workers: int  # thread blocks
    block: int  # keys
    stages: int
    raw_stages: int  # of an 8-bit cache
    chunks: int  # of a worker, where rows are alike


class Chunking(NamedTuple):
    """How rows are cut, from static shapes: `usual` chunks of a row and kv head give every worker
    `tiles.chunks` when rows are alike; a chunk has at most `cap` blocks, so that a long row among
    short ones is shared too; `slots` is the most chunks there can be."""

    usual: int
    cap: int
    slots: int


def chunking(R: int, K: int, blocks: int, tiles: DecodeTiles, result_bytes: int) -> Chunking:
    """For R rows of at most `blocks` blocks."""
    usual = -(-tiles.chunks * tiles.workers // (R * K))
    most = max(usual, PARTIAL_BYTES // (result_bytes * R * K), 1)
    cap = max(-(-blocks // most), LARGE_CHUNK)
    return Chunking(usual, cap, R * K * max(usual, -(-blocks // cap)))


class Shares(NamedTuple):
    """Who does what; blocks and chunks are counted over rows, then kv heads, then within a row."""

    row_R7: jax.Array  # columns of RowPlan
    worker_W: jax.Array  # the row where a worker's share starts
    share_2: jax.Array  # blocks of a worker, blocks in all


class RowPlan(NamedTuple):
    length: Any
    first: Any  # block that the query sees
    blocks: Any  # from there
    chunk: Any  # blocks of a chunk; the last may have fewer
    blocks_before: Any  # of other rows, for one kv head
    chunks_before: Any
    next: Any  # row that has any

    @classmethod
    def read(cls, row_g, row) -> "RowPlan":
        return cls(*(row_g[row, c] for c in range(len(cls._fields))))

    @property
    def chunks(self):
        return lax.div(self.blocks + self.chunk - 1, self.chunk)


def shares(
    ragged: Ragged, window, size: int | None, *, K: int, tiles: DecodeTiles, cuts: Chunking
) -> Shares:
    """`size` is the attention_chunk_size."""
    R = ragged.kv_len_R.shape[0]
    r = jnp.arange(R, dtype=INT)
    live_R = r < jnp.minimum(ragged.num_decodes, ragged.num_rows)
    len_R = jnp.where(live_R, ragged.kv_len_R, 0).astype(INT)
    first_R = oldest(len_R - 1, window, size) // tiles.block
    blocks_R = (len_R + tiles.block - 1) // tiles.block - first_R
    chunk_R = jnp.clip((blocks_R + cuts.usual - 1) // cuts.usual, LEAST_CHUNK, cuts.cap)
    chunks_R = (blocks_R + chunk_R - 1) // chunk_R
    # Comparing all with all is one fused loop; a scan or a search would be several.
    later_RR = r[None] > r[:, None]
    before = lambda x_R: jnp.where(later_RR, x_R[:, None], 0).sum(0)
    next_R = jnp.where(later_RR.T & (blocks_R > 0)[:, None], r[:, None], R).min(0)
    before_R, total = before(blocks_R), blocks_R.sum() * K
    share = jnp.maximum((total + tiles.workers - 1) // tiles.workers, 1)
    end_R = (before_R + blocks_R) * K
    start_W = jnp.arange(tiles.workers, dtype=INT) * share
    worker_W = (end_R[None] <= start_W[:, None]).sum(1)
    rows = RowPlan(len_R, first_R, blocks_R, chunk_R, before_R, before(chunks_R), next_R)
    row_R7 = jnp.stack([x.astype(INT) for x in rows], 1)
    return Shares(row_R7, worker_W.astype(INT), jnp.stack([share, total]).astype(INT))


def decode(
    q_RKgH, k_LPKSH, v_LPKSH, layer, ragged: Ragged, heads_K4g, *, window,
    attention_chunk_size: int | None, G: int, softcap, alibi, sinks: bool, dtype: Any,
    tiles: DecodeTiles, interpret: Any,
):  # fmt: skip
    """o_RNH of the first num_decodes rows, zeros for the others. Of a kv head's g queries the
    first G are real; g is a multiple of 8."""
    R, K, g, H = q_RKgH.shape
    values = -(-H // 64) * 64
    ragged = ragged._replace(pages_RM=ragged.pages_RM[:R], kv_len_R=ragged.kv_len_R[:R])
    most = -(-ragged.pages_RM.shape[1] * k_LPKSH.shape[3] // tiles.block)
    tiles = tiles._replace(workers=min(tiles.workers, R * K * -(-most // LEAST_CHUNK)))
    cuts = chunking(R, K, most, tiles, 4 * values * g)
    table = shares(ragged, window, attention_chunk_size, K=K, tiles=tiles, cuts=cuts)
    ring = Ring(
        tiles.block, k_LPKSH.shape[3], H, values, k_LPKSH.dtype, tiles.stages, tiles.raw_stages, 1
    )
    scalars = jnp.stack([jnp.asarray(layer, INT), jnp.asarray(window, INT)])
    partial_o, partial_ml = _attend(
        ring, tiles, cuts.slots, attention_chunk_size, softcap, alibi, interpret,
        (q_RKgH, k_LPKSH, v_LPKSH, heads_K4g, *table, ragged.pages_RM.astype(INT), scalars),
    )  # fmt: skip
    return _merge(partial_o, partial_ml, heads_K4g, table, (R, K, G, H), sinks, dtype, interpret)


def _attend(ring: Ring, tiles, slots, size, softcap, alibi, interpret, operands):
    dtype, block, values = compute_dtype(ring.kv_dtype), ring.block, ring.value_columns
    _, K, g, _ = operands[0].shape

    def chunks(row_g, worker_g, share_g, visit) -> tuple:
        """visit(nth, row, plan, head, chunk, blocks, done) for each chunk of this worker, of which
        there are `nth` and `done` blocks before; the number of both at the end."""
        worker = lax.axis_index("worker")
        start, total = worker * share_g[0], share_g[1]
        stop = jnp.minimum(start + share_g[0], total)

        def following(row, plan, head, chunk):
            """The chunk itself, or what follows a row's or head's last."""
            within = chunk < plan.chunks
            head = jnp.where(within, head, head + 1)
            same = head < K
            row = jnp.where(same, row, plan.next)
            return row, jnp.where(same, head, 0), jnp.where(within, chunk, 0)

        def begin():
            """The first chunk that starts within the share, and the block where it does."""
            row = worker_g[worker]
            plan = RowPlan.read(row_g, row)
            offset = start - plan.blocks_before * K
            head, within = lax.div(offset, plan.blocks), lax.rem(offset, plan.blocks)
            chunk = lax.div(within + plan.chunk - 1, plan.chunk)
            skipped = jnp.minimum(chunk * plan.chunk, plan.blocks) - within
            return start + skipped, *following(row, plan, head, chunk)

        def step(carry):
            nth, done, at, row, head, chunk = carry
            plan = RowPlan.read(row_g, row)
            blocks = jnp.minimum(plan.blocks - chunk * plan.chunk, plan.chunk)
            visit(nth, row, plan, head, chunk, blocks, done)
            return nth + 1, done + blocks, at + blocks, *following(row, plan, head, chunk + 1)

        none = (total, INT(0), INT(0), INT(0))
        first = lax.cond(start < total, begin, lambda: none)
        carry = lax.while_loop(lambda c: c[2] < stop, step, (INT(0), INT(0), *first))
        return carry[:2]

    def body(q_g, k_g, v_g, heads_g, row_g, worker_g, share_g, pages_g, scalars_g, o_g, ml_g, *_,
             refs, q_s, p_s, q_full, q_free):  # fmt: skip
        role = lax.axis_index("role")
        layer, window = scalars_g[0], scalars_g[1]

        @pl.when(role == 1)
        def fetching():
            def visit(nth, row, plan, head, chunk, blocks, done):
                side = lax.rem(nth, INT(2))
                block = plan.first + chunk * plan.chunk

                @pl.when(nth >= 2)
                def _():
                    plgpu.barrier_wait(q_free.at[side])

                plgpu.copy_gmem_to_smem(q_g.at[row, head], q_s.at[side], q_full.at[side])

                @pl.loop(0, blocks)
                def _(i):
                    pages = block_pages(ring, pages_g, row, block + i, plan.length)
                    fetch(ring, refs, k_g, v_g, done + i, layer, pages, head)

            nth, count = chunks(row_g, worker_g, share_g, visit)
            finish(ring, refs, count)

            @pl.loop(jnp.maximum(nth - 2, 0), nth)
            def _(i):
                plgpu.barrier_wait(q_free.at[lax.rem(i, INT(2))])

        @pl.when(role == 0)
        def computing():
            def visit(nth, row, plan, head, chunk, blocks, done):
                side = lax.rem(nth, INT(2))
                block = plan.first + chunk * plan.chunk
                first_key = oldest(plan.length - 1, window, size)
                scale_g = plgpu.load(heads_g.at[head, 0], layout=COLUMN, optimized=False)
                slope_g = plgpu.load(heads_g.at[head, 3], layout=COLUMN, optimized=False)
                plgpu.barrier_wait(q_full.at[side])
                wide = lambda x: lax.broadcast_in_dim(x, (ring.block, g), [1])

                def step(i, carry):
                    m, l, acc = carry
                    slot = lax.rem(done + i, INT(ring.stages))
                    plgpu.barrier_wait(refs["full_k"].at[slot])
                    s = product(refs["k"].at[slot], q_s.at[side].T, (ring.block, g))
                    plgpu.barrier_arrive(refs["free_k"].at[slot])
                    s = capped(s * wide(scale_g), softcap)
                    pos = (
                        plgpu.broadcasted_iota(INT, (ring.block, g), 0, layout=plgpu.Layout.WGMMA)
                        + (block + i) * ring.block
                    )
                    behind = plan.length - 1 - pos
                    if alibi:
                        s = s - wide(slope_g) * behind.astype(jnp.float32)
                    s = jnp.where((behind >= 0) & (pos >= first_key), s, MASKED)
                    new_m = jnp.maximum(m, s.max(axis=0))
                    shrink = jnp.exp2(m - new_m)
                    p = jnp.exp2(s - wide(new_m))
                    l = l * wide(shrink) + p
                    p_s.T[...] = plgpu.layout_cast(p.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    plgpu.barrier_wait(refs["full_v"].at[slot])
                    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [1])
                    acc = _accumulate(acc, refs["v"].at[slot].T, p_s.T, interpret)
                    plgpu.barrier_arrive(refs["free_v"].at[slot])
                    return new_m, l, acc

                zero = lambda *shape: filled(shape, 0.0, plgpu.Layout.WGMMA)
                start = (filled((g,), LOWEST, COLUMN), zero(ring.block, g), zero(values, g))
                m, l, acc = lax.fori_loop(0, blocks, step, start)
                plgpu.barrier_arrive(q_free.at[side])
                slot = plan.chunks_before * K + head * plan.chunks + chunk
                o_g.at[slot][...] = acc
                ml_g.at[slot, 0][...] = m
                ml_g.at[slot, 1][...] = l.sum(axis=0)

            chunks(row_g, worker_g, share_g, visit)

    transforms = swizzled(dtype, ring.head_dim)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((slots, values, g), jnp.float32),
            jax.ShapeDtypeStruct((slots, 2, g), jnp.float32),
        ),
        grid=(tiles.workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types={
            "refs": ring.scratch(),
            "q_s": plgpu.SMEM((2, g, ring.head_dim), dtype, transforms=transforms),
            "p_s": plgpu.SMEM((g, block), dtype, transforms=transforms),
            "q_full": plgpu.Barrier(num_barriers=2),
            "q_free": plgpu.Barrier(num_barriers=2),
        },
        interpret=interpret,
    )(*operands)


def _accumulate(acc, a, b, interpret):
    """acc + a @ b, both in SMEM."""
    if interpret:  # the interpreter does not know ACC.init
        return acc + product(a, b, acc.shape)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(ACC.init(acc))


def _merge(partial_o, partial_ml, heads_K4g, table: Shares, shape, sinks, dtype, interpret):
    """o_RNH from the partial results: those of a row and kv head lie one after the other."""
    (R, K, G, H), (_, values, g) = shape, partial_o.shape

    def body(o_g, ml_g, heads_g, row_g, out_g, o_s):
        row, head = lax.axis_index("row"), lax.axis_index("head")
        column = lambda ref: plgpu.load(ref, layout=COLUMN, optimized=False)
        plan = RowPlan.read(row_g, row)
        start = plan.chunks_before * K + head * plan.chunks
        wide = lambda x: lax.broadcast_in_dim(x, (values, g), [1])

        def step(slot, carry):
            m, l, acc = carry
            m_part, l_part = column(ml_g.at[slot, 0]), column(ml_g.at[slot, 1])
            o_part = plgpu.load(o_g.at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
            new_m = jnp.maximum(m, m_part)
            old, new = jnp.exp2(m - new_m), jnp.exp2(m_part - new_m)
            return new_m, l * old + l_part * new, acc * wide(old) + o_part * wide(new)

        # A sink is one more score, seen first, whose value is zero.
        m = column(heads_g.at[head, 2]) if sinks else filled((g,), LOWEST, COLUMN)
        l = filled((g,), float(sinks), COLUMN)
        carry = (m, l, filled((values, g), 0.0, plgpu.Layout.WGMMA))
        m, l, acc = lax.fori_loop(start, start + plan.chunks, step, carry)
        v_scale = column(heads_g.at[head, 1])
        factor = v_scale / jnp.where(l > 0.0, l, 1.0)
        o = (acc * wide(factor)).astype(dtype)
        o_s.T[...] = plgpu.layout_cast(o, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, out_g.at[row, head])
        plgpu.wait_smem_to_gmem(0)

    o_RKgH = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((R, K, g, values), dtype),
        grid=(R, K),
        grid_names=("row", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[plgpu.SMEM((g, values), dtype, transforms=swizzled(dtype, values))],
        interpret=interpret,
    )(partial_o, partial_ml, heads_K4g, table.row_R7)
    return o_RKgH[:, :, :G, :H].reshape(R, K * G, H)
