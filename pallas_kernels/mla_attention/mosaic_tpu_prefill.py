"""Rows with any number of queries on TPU.

A row's new tokens are written first, page by page; then tiles of its queries, with all their
heads, stay in VMEM while the row's pages go by.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import Device
from pallas_kernels.mla_attention.mosaic_tpu_common import (
    Scalars,
    Shapes,
    State,
    Tiles,
    attend,
    fetch,
    reset,
    result,
)

SUBLANES = 8  # rows of a register tile of float32


def run(
    scalars: Scalars, q_TNC, q_TNE, new_TD, kv_LPSD, *,
    shapes: Shapes, tiles: Tiles, device: Device, interpret,
):  # fmt: skip
    """(q_TNC with its prefill rows replaced by their outputs, the cache)."""
    N, C, D, S, M = shapes[:5]
    T, E = q_TNC.shape[0], q_TNE.shape[2]
    block = max(min(tiles.prefill_tokens, M * S) // S, 1) * S
    queries = max(tiles.prefill_rows // N, 1)
    queries = min(1 << (queries.bit_length() - 1), 1 << (T - 1).bit_length())  # powers of 2
    X = queries * N
    # A page may begin before the first token and end after the last.
    new_XD = jnp.pad(new_TD, ((S, 2 * S), (0, 0)))
    new_XD = jnp.pad(new_XD, ((0, -len(new_XD) % SUBLANES), (0, 0)))
    pairs = T * max(M * S - T // 2, T // 2)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, shapes=shapes),
        out_shape=(
            jax.ShapeDtypeStruct(q_TNC.shape, q_TNC.dtype),
            jax.ShapeDtypeStruct(kv_LPSD.shape, kv_LPSD.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[hbm, hbm, hbm, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[
                pltpu.VMEM((queries, N, C), q_TNC.dtype),
                pltpu.VMEM((queries, N, E), q_TNE.dtype),
                pltpu.VMEM((2, block, D), kv_LPSD.dtype),
                pltpu.VMEM((2, S + SUBLANES, D), jnp.float32),
                pltpu.VMEM((2, S, D), kv_LPSD.dtype),
                State(
                    pltpu.VMEM((X, 128), jnp.float32),
                    pltpu.VMEM((X, 128), jnp.float32),
                    pltpu.VMEM((X, C), jnp.float32),
                ),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={len(scalars): 0, len(scalars) + 3: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=device.scratch_bytes * 3 // 4
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * N * (2 * C + E),
            transcendentals=pairs * N,
            # Everything once: how often the pages go by depends on the rows' lengths.
            bytes_accessed=(M * S + T) * D * kv_LPSD.dtype.itemsize
            + T * N * (2 * C + E) * q_TNC.dtype.itemsize,
        ),
        name="mla_attention_prefill",
        interpret=interpret,
    )(*scalars, q_TNC, q_TNE, new_XD, kv_LPSD)


def _kernel(*refs, shapes: Shapes):
    c = Scalars(*refs[:5])
    q_hbm, qe_hbm, new_hbm, kv_hbm, o_hbm, kv_out_hbm = refs[5:11]
    q, qe, kv, window, page_buffer, state, q_sem, kv_sem, read_sem, write_sem = refs[11:]
    N, C, S, M = shapes.N, shapes.C, shapes.S, shapes.M
    queries, size = q.shape[0], kv.shape[1]
    # What no page or query has been copied to must be finite: it counts, with a probability of 0.
    kv[...] = jnp.zeros_like(kv)
    q[...] = jnp.zeros_like(q)
    qe[...] = jnp.zeros_like(qe)

    def write_row(r):
        """Read each page that the row's new tokens touch, put them in, and write it."""
        start, end, length = c.start_R[r], c.start_R[r + 1], c.kv_len_R[r]
        old = length - (end - start)  # tokens that were there before
        first, last = old // S, pl.cdiv(length, S)

        page_of = lambda j: (c.counts[0], c.pages[r * M + j])
        # Slot 0 of page j is token start - old + j * S, after S rows of padding.
        token_of = lambda j: start - old + j * S + S

        def read(do, j, slot):
            page = kv_hbm.at[page_of(j)]
            getattr(pltpu.make_async_copy(page, page_buffer.at[slot], read_sem.at[slot]), do)()
            aligned = pl.multiple_of(token_of(j) // SUBLANES * SUBLANES, SUBLANES)
            new = new_hbm.at[pl.ds(aligned, S + SUBLANES)]
            getattr(pltpu.make_async_copy(new, window.at[slot], read_sem.at[slot]), do)()

        def write(do, j, slot):
            page = kv_out_hbm.at[page_of(j)]
            getattr(pltpu.make_async_copy(page_buffer.at[slot], page, write_sem.at[slot]), do)()

        @pl.when(first < last)
        def _():
            read("start", first, lax.rem(first, 2))

        @pl.loop(first, last)
        def _(j):
            slot = lax.rem(j, 2)

            @pl.when(j - first >= 1)
            def _():
                write("wait", j - 1, 1 - slot)

            @pl.when(j + 1 < last)
            def _():
                read("start", j + 1, 1 - slot)

            read("wait", j, slot)
            rows = S + SUBLANES
            shift = lax.rem(token_of(j), SUBLANES)
            moved = pltpu.roll(window[slot], lax.rem(rows - shift, rows), axis=0)[:S]
            place = j * S + lax.broadcasted_iota(jnp.int32, moved.shape, 0)
            page = page_buffer[slot].astype(jnp.float32)
            page = jnp.where((place >= old) & (place < length), moved, page)
            page_buffer[slot] = page.astype(page_buffer.dtype)
            write("start", j, slot)

        @pl.when(first < last)
        def _():
            write("wait", last - 1, lax.rem(last - 1, 2))

    def pieces(count, do):
        """do(first, n) for static n, powers of 2, that add up to count."""
        n = queries
        while n:

            @pl.when(count & n > 0)
            def _(n=n):
                do(count // (2 * n) * (2 * n), n)

            n //= 2

    def move(token, count, pairs):
        """Copy `count` tokens between each pair of HBM and VMEM, and wait."""
        for do in ("start", "wait"):

            def piece(first, n, do=do):
                for hbm, vmem, out in pairs:
                    there = hbm.at[pl.ds(token + first, n)], vmem.at[pl.ds(first, n)]
                    there = there[::-1] if out else there
                    getattr(pltpu.make_async_copy(*there, q_sem), do)()

            pieces(count, piece)

    def attend_tile(r, token):
        end, length = c.start_R[r + 1], c.kv_len_R[r]
        count = jnp.minimum(end - token, queries)
        seen = length - (end - token) + 1  # tokens that the first query sees
        most = seen + count - 1
        blocks = pl.cdiv(most, size)
        pages = lambda do, b, slot: fetch(
            do, c, kv_out_hbm, kv.at[slot], kv_sem.at[slot], r, b, most, shapes
        )
        pages("start", 0, 0)
        move(token, count, ((q_hbm, q, False), (qe_hbm, qe, False)))
        reset(state)

        @pl.loop(0, blocks)
        def _(b):
            slot = lax.rem(b, 2)

            @pl.when(b + 1 < blocks)
            def _():
                pages("start", b + 1, 1 - slot)

            pages("wait", b, slot)
            shape = (queries * N, size)
            query = lax.broadcasted_iota(jnp.int32, shape, 0) // N
            place = b * size + lax.broadcasted_iota(jnp.int32, shape, 1)
            attend(
                state, q[...].reshape(queries * N, C), qe[...].reshape(queries * N, -1),
                kv[slot], place - query < seen, shapes.scale * c.kv_scale[0],
            )  # fmt: skip

        q[...] = result(state, c.kv_scale[0]).astype(q.dtype).reshape(q.shape)
        move(token, count, ((o_hbm, q, True),))

    @pl.loop(c.counts[1], c.counts[2])
    def _(r):
        @pl.when(c.kv_len_R[r] > 0)
        def _():
            write_row(r)
            start, end = c.start_R[r], c.start_R[r + 1]

            @pl.loop(0, pl.cdiv(end - start, queries))
            def _(i):
                attend_tile(r, start + i * queries)
