"""Rows with one query on TPU.

Each core takes an equal number of rows. A row's new token is put into the last block where that
lies in VMEM, and from there into the cache.
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


def run(
    scalars: Scalars, q_TNC, q_TNE, new_TD, kv_LPSD, *,
    shapes: Shapes, tiles: Tiles, device: Device, interpret,
):  # fmt: skip
    """(q_TNC with its decode rows replaced by their outputs, the cache)."""
    N, C, D, S, M = shapes[:5]
    R, E = scalars.kv_len_R.shape[0], q_TNE.shape[2]
    rows = min(R, q_TNC.shape[0])
    block = max(min(tiles.decode_tokens, M * S) // S, 1) * S
    hbm, vmem = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.VMEM)
    tokens = rows * M * S
    size = kv_LPSD.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, shapes=shapes, cores=device.cores),
        out_shape=(
            jax.ShapeDtypeStruct(q_TNC.shape, q_TNC.dtype),
            jax.ShapeDtypeStruct(kv_LPSD.shape, kv_LPSD.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(device.cores,),
            in_specs=[hbm, hbm, vmem, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[
                pltpu.VMEM((2, N, C), q_TNC.dtype),
                pltpu.VMEM((2, N, E), q_TNE.dtype),
                pltpu.VMEM((2, N, C), q_TNC.dtype),
                pltpu.VMEM((2, block, D), kv_LPSD.dtype),
                State(
                    pltpu.VMEM((N, 128), jnp.float32),
                    pltpu.VMEM((N, 128), jnp.float32),
                    pltpu.VMEM((N, C), jnp.float32),
                ),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        input_output_aliases={len(scalars): 0, len(scalars) + 3: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=device.scratch_bytes // 2
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * N * (2 * C + E),
            transcendentals=tokens * N,
            bytes_accessed=tokens * D * size + rows * N * (2 * C + E) * q_TNC.dtype.itemsize,
        ),
        name="mla_attention_decode",
        interpret=interpret,
    )(*scalars, q_TNC, q_TNE, new_TD[:rows], kv_LPSD)


def _kernel(*refs, shapes: Shapes, cores: int):
    c = Scalars(*refs[:5])
    q_hbm, qe_hbm, new_vmem, kv_hbm, o_hbm, kv_out_hbm = refs[5:11]
    q, qe, o, kv, state, q_sem, kv_sem, o_sem, new_sem = refs[11:]
    S, M, G = shapes.S, shapes.M, shapes.granule
    size = kv.shape[1]
    share = pl.cdiv(c.counts[1], cores)
    first = pl.program_id(0) * share
    last = jnp.minimum(first + share, c.counts[1])
    # What no page has been copied to counts with a probability of 0; it must be finite.
    kv[...] = jnp.zeros_like(kv)

    def queries(do: str, row, slot):
        for hbm, vmem in ((q_hbm, q), (qe_hbm, qe)):
            getattr(pltpu.make_async_copy(hbm.at[row], vmem.at[slot], q_sem.at[slot]), do)()

    def output(do: str, row, slot):
        getattr(pltpu.make_async_copy(o.at[slot], o_hbm.at[row], o_sem.at[slot]), do)()

    def blocks_of(row):
        return jnp.maximum(pl.cdiv(c.kv_len_R[row], size), 1)  # an empty row has an empty block

    def pages(do: str, row, block, slot):
        fetch(do, c, kv_hbm, kv.at[slot], kv_sem.at[slot], row, block, c.kv_len_R[row], shapes)

    @pl.when(first < last)
    def _():
        queries("start", first, lax.rem(first, 2))
        pages("start", first, 0, 0)

    def row(r, step):
        length, blocks, slot_q = c.kv_len_R[r], blocks_of(r), lax.rem(r, 2)
        more = r + 1 < last

        @pl.when(more)
        def _():
            queries("start", r + 1, 1 - slot_q)

        queries("wait", r, slot_q)
        reset(state)
        place = length - 1 - (blocks - 1) * size  # of the new token in the last block
        aligned = pl.multiple_of(jnp.maximum(place, 0) // G * G, G)
        final_slot = lax.rem(step + blocks - 1, 2)
        page = c.pages[r * M + jnp.maximum(length - 1, 0) // S]
        tile = kv.at[final_slot, pl.ds(aligned, G)]
        within = pl.multiple_of(lax.rem(aligned, S), G)
        write = pltpu.make_async_copy(
            tile, kv_out_hbm.at[c.counts[0], page, pl.ds(within, G)], new_sem
        )

        def block(b, step):
            slot = lax.rem(step, 2)
            final = b + 1 == blocks

            @pl.when(jnp.logical_not(final))
            def _():
                pages("start", r, b + 1, 1 - slot)

            @pl.when(final & more)
            def _():
                pages("start", r + 1, 0, 1 - slot)

            pages("wait", r, b, slot)

            @pl.when(final & (length > 0))
            def _():
                new_1D = new_vmem[pl.ds(r, 1), :]
                here = lax.broadcasted_iota(jnp.int32, tile.shape, 0) == place - aligned
                tile[...] = jnp.where(here, new_1D, tile[...].astype(jnp.float32)).astype(kv.dtype)
                write.start()

            seen = lax.broadcasted_iota(jnp.int32, (shapes.N, size), 1) < length - b * size
            attend(state, q[slot_q], qe[slot_q], kv[slot], seen, shapes.scale * c.kv_scale[0])
            return step + 1

        step = lax.fori_loop(0, blocks, block, step)

        @pl.when(length > 0)
        def _():
            write.wait()

        @pl.when(r - first >= 2)
        def _():
            output("wait", r - 2, slot_q)

        # An empty row keeps what it had.
        o[slot_q] = jnp.where(
            length > 0, result(state, c.kv_scale[0]), q[slot_q].astype(jnp.float32)
        ).astype(o.dtype)
        output("start", r, slot_q)
        return step

    lax.fori_loop(first, last, row, 0)
    for back in (2, 1):

        @pl.when(last - back >= first)
        def _(back=back):
            output("wait", last - back, lax.rem(last - back, 2))
