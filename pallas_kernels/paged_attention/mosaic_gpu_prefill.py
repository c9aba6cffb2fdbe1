"""Prefill attention on Hopper: rows with any number of queries over their cached keys.

The matrix units bound it: 4 H operations for each visible pair of a query and a key, on keys that
whole tiles of queries share. So:

- A tile is 128 (token, query head) pairs of one row and one kv head: the G query heads of a token
  lie side by side, and a short chunk of a grouped model still fills a tile.
- Two computing warpgroups take 64 rows each and alternate: while one is in its softmax, the other
  has the matrix unit. A third fetches blocks of keys and values by TMA, and turns 8-bit ones into
  float16.
- Only blocks that a causal or window edge crosses are masked; those outside are not fetched. The
  tiles of a row run from its end, where they are longest; those of one kv head run together, so
  that its pages stay in L2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ACC, mma_from_registers, swizzled
from pallas_kernels.paged_attention.layout import Ragged
from pallas_kernels.paged_attention.mosaic_gpu_blocks import (
    INT,
    LOWEST,
    MASKED,
    ROWS,
    Ring,
    block_pages,
    capped,
    compute_dtype,
    fetch,
    filled,
    finish,
)
from pallas_kernels.reach import into_chunk, oldest

HALF = 64  # rows of a computing warpgroup
TILE = 2 * HALF
ROW = plgpu.Layout.WGMMA.reduce(1)  # one number for each query
COMPUTING, FETCHING = 2, 1  # warpgroups
# Registers of a thread; all three warpgroups together have 512.
COMPUTING_REGISTERS, FETCHING_REGISTERS = 232, 40
CONVERTING = (208, 96)  # the same where the fetching warpgroup converts 8-bit pages


class PrefillTiles(NamedTuple):
    block: int  # keys
    stages: int
    raw_stages: int  # of an 8-bit cache


class Tile(NamedTuple):
    """What a thread block computes, as the columns of a table. Pairs (token, head of the group)
    are counted through the step: pair i is token i // G."""

    row: Any
    first: Any  # pair, a multiple of 8; those before `start` are another row's
    start: Any  # pairs of the row
    end: Any
    shift: Any  # from a token's index to its position
    length: Any  # of the row's cache
    begin: Any  # blocks that some pair sees: [begin, stop)
    whole: Any  # blocks that all pairs see wholly: [whole, cut)
    cut: Any
    stop: Any


def tile_table(ragged: Ragged, window, size: int | None, *, T: int, G: int, block: int) -> tuple:
    """(Tile as columns [tiles, 10], number of tiles): the prefill rows' tiles and, as one more row
    that sees nothing, the padding tokens': their outputs are zeros. `size` is the
    attention_chunk_size."""
    R = ragged.kv_len_R.shape[0]
    r = jnp.arange(R + 1, dtype=INT)
    start_R = ragged.start_R.astype(INT)  # of the padding too: it starts where the last row ends
    start_r = jnp.where(r < R, start_R, start_R[ragged.num_rows])
    end_r = jnp.where(r < R, jnp.append(start_R[1:], 0), T)
    live_r = ((r >= ragged.num_decodes) & (r < ragged.num_rows)) | (r == R)
    len_r = jnp.append(ragged.kv_len_R.astype(INT), 0)
    base_r = start_r * G // ROWS * ROWS
    count_r = jnp.where(live_r & (end_r > start_r), (end_r * G - base_r + TILE - 1) // TILE, 0)
    before_r = jnp.where(r[None] > r[:, None], count_r[:, None], 0).sum(0)
    total = count_r.sum()

    most = -(-(T * G + (TILE + ROWS - 2) * (min(R, T) + 1)) // TILE)
    i = total - 1 - jnp.arange(most, dtype=INT)  # a row's last tile first
    row = jnp.clip((before_r[None] <= i[:, None]).sum(1) - 1, 0, R).astype(INT)
    first = base_r[row] + (i - before_r[row]) * TILE
    start, end, length = start_r[row] * G, end_r[row] * G, len_r[row]
    shift = length - end_r[row]
    low = jnp.maximum(first, start) // G + shift  # positions of the first and the last query
    high = (jnp.minimum(first + TILE, end) - 1) // G + shift
    sees = (length > 0) & (i >= 0)
    stop = jnp.where(sees, high // block + 1, 0)
    begin = jnp.where(sees, oldest(low, window, size) // block, 0)
    whole = jnp.clip((oldest(high, window, size) + block - 1) // block, begin, stop)
    cut = jnp.clip((low + 1) // block, whole, stop)
    columns = Tile(row, first, start, end, shift, length, begin, whole, cut, stop)
    return jnp.stack([c.astype(INT) for c in columns], 1), total.astype(INT)


def prefill(
    q_KXH, k_LPKSH, v_LPKSH, layer, ragged: Ragged, heads_KG4, *, T: int, window,
    attention_chunk_size: int | None, softcap, alibi: bool, sinks: bool, dtype,
    tiles: PrefillTiles, interpret: Any,
):  # fmt: skip
    """o_TNH of the rows from num_decodes on, zeros for padding tokens; the tokens of decode rows
    are left unwritten. q_KXH holds pair after pair, and TILE more."""
    (K, _, H), G = q_KXH.shape, heads_KG4.shape[1]
    table, total = tile_table(ragged, window, attention_chunk_size, T=T, G=G, block=tiles.block)
    ring = Ring(
        tiles.block, k_LPKSH.shape[3], H, H, k_LPKSH.dtype, tiles.stages, tiles.raw_stages,
        COMPUTING,
    )  # fmt: skip
    scalars = jnp.stack([jnp.asarray(layer, INT), jnp.asarray(window, INT), total])
    # The sink and the slope of a tile's row, from whichever head the tile starts with.
    heads = jnp.arange(G + TILE) % G
    row_K2n = heads_KG4[:, heads, 2:].transpose(0, 2, 1)
    operands = (q_KXH, k_LPKSH, v_LPKSH, heads_KG4[:, 0, :2], table, ragged.pages_RM.astype(INT))
    per_row = (row_K2n,) if alibi or sinks else ()
    return _attend(
        ring, (T, K * G, H, G), attention_chunk_size, softcap, alibi, sinks, dtype, interpret,
        (*operands, scalars, *per_row),
    )  # fmt: skip


def _attend(ring: Ring, shape, size, softcap, alibi, sinks, out_dtype, interpret, operands):
    (T, N, H, G), block, dtype = shape, ring.block, compute_dtype(ring.kv_dtype)
    folded = softcap is None and not alibi  # scale and maximum are one multiply-add with q·k
    registers = CONVERTING if ring.raw else (COMPUTING_REGISTERS, FETCHING_REGISTERS)

    def body(q_g, k_g, v_g, scale_g, tile_g, pages_g, scalars_g, *rest, refs, shared, p_s, q_full,
             turn):  # fmt: skip
        *row_g, out_g = rest
        q_s, o_s = shared
        index, head, role = (lax.axis_index(x) for x in ("tile", "head", "role"))
        layer, window, total = scalars_g[0], scalars_g[1], scalars_g[2]
        tile = Tile(*(tile_g[index, c] for c in range(len(Tile._fields))))

        @pl.when((index < total) & (role == COMPUTING))
        def fetching():
            plgpu.set_max_registers(registers[1], action="decrease")
            for half in range(COMPUTING):
                rows = pl.ds(pl.multiple_of(tile.first, ROWS) + half * HALF, HALF)
                plgpu.copy_gmem_to_smem(q_g.at[head, rows], q_s.at[half], q_full.at[half])

            @pl.loop(tile.begin, tile.stop)
            def _(i):
                pages = block_pages(ring, pages_g, tile.row, i, tile.length)
                fetch(ring, refs, k_g, v_g, i - tile.begin, layer, pages, head)

            finish(ring, refs, tile.stop - tile.begin)

        @pl.when((index < total) & (role < COMPUTING))
        def computing():
            plgpu.set_max_registers(registers[0], action="increase")
            first = tile.first + role * HALF
            scale, v_scale = scale_g[head, 0], scale_g[head, 1]
            queries = plgpu.broadcasted_iota(INT, (HALF,), 0, layout=ROW) + first
            pos = lax.div(queries, jnp.full((HALF,), G, INT)) + tile.shift
            across = lambda x: lax.broadcast_in_dim(x, (HALF, block), [0])
            wide = lambda x: lax.broadcast_in_dim(x, (HALF, H), [0])
            of_row = lambda c: plgpu.load(
                row_g[0].at[head, c, pl.ds(lax.rem(first, INT(G)), HALF)],
                layout=ROW, optimized=False,
            )  # fmt: skip
            slope = of_row(1) if alibi else None
            plgpu.barrier_wait(q_full.at[role])

            def meet():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def step(i, carry, *, masked: bool):
                m, l, acc = carry
                slot = lax.rem(i - tile.begin, INT(ring.stages))
                plgpu.barrier_wait(refs["full_k"].at[slot])

                def scores(s_ref):
                    plgpu.wgmma(s_ref, q_s.at[role], refs["k"].at[slot].T)
                    meet()  # the other may have its softmax: the matrix unit is this one's
                    return s_ref[...]

                s = pl.run_scoped(scores, ACC((HALF, block), jnp.float32))
                plgpu.barrier_arrive(refs["free_k"].at[slot])
                if not folded:
                    s = capped(s * scale, softcap)
                if masked or alibi:
                    keys = plgpu.broadcasted_iota(INT, (HALF, block), 1, layout=plgpu.Layout.WGMMA)
                    behind = across(pos - i * block) - keys
                    if alibi:
                        s = s - across(slope) * behind.astype(jnp.float32)
                    if masked:
                        seen = (behind >= 0) & (behind < window)
                        if size is not None:
                            seen &= behind <= across(into_chunk(pos, size))
                        s = jnp.where(seen, s, MASKED)
                factor = scale if folded else jnp.float32(1)
                new_m = jnp.maximum(m, s.max(axis=1) * factor)
                shrink = jnp.exp2(m - new_m)
                p = jnp.exp2(s * factor - across(new_m))
                l = l * shrink + p.sum(axis=1)
                acc = acc * wide(shrink)
                p_low = p.astype(dtype)
                acc, l, new_m, p_low = lax.optimization_barrier((acc, l, new_m, p_low))
                meet()
                plgpu.barrier_wait(refs["full_v"].at[slot])
                detour = p_s.at[role] if interpret else None
                acc = mma_from_registers(acc, p_low, refs["v"].at[slot], detour)
                plgpu.barrier_arrive(refs["free_v"].at[slot])
                return new_m, l, acc

            # A sink is one more score, seen first, whose value is zero.
            m = of_row(0) if sinks else filled((HALF,), LOWEST, ROW)
            carry = (m, filled((HALF,), float(sinks), ROW),
                     filled((HALF, H), 0.0, plgpu.Layout.WGMMA))  # fmt: skip
            pl.when(role == 1)(meet)  # half a step behind the other
            edge = lambda i, c: step(i, c, masked=True)
            carry = lax.fori_loop(tile.begin, tile.whole, edge, carry)
            inner = lambda i, c: step(i, c, masked=False)
            carry = lax.fori_loop(tile.whole, tile.cut, inner, carry)
            m, l, acc = lax.fori_loop(tile.cut, tile.stop, edge, carry)
            pl.when(role == 0)(meet)
            factor = v_scale / jnp.where(l > 0.0, l, 1.0)
            o_s[role] = (acc * wide(factor)).astype(out_dtype)
            plgpu.commit_smem()

            # Row by row: a tile may begin or end inside another row's tokens, and a token's heads
            # may lie on both sides of a tile's border.
            @pl.loop(0, HALF)
            def _(j):
                pair = first + j

                @pl.when((pair >= tile.start) & (pair < tile.end))
                def _():
                    query = head * G + lax.rem(pair, INT(G))
                    to = out_g.at[lax.div(pair, INT(G)), pl.ds(query, 1)]
                    plgpu.copy_smem_to_gmem(o_s.at[role, pl.ds(j, 1)], to, commit_group=False)

            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

    tile = swizzled(dtype, H)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((T, N, H), out_dtype),
        grid=(operands[4].shape[0], N // G),
        grid_names=("tile", "head"),
        num_threads=COMPUTING + FETCHING,
        thread_name="role",
        # Rows are reduced within a warp: no scratch for reductions across warps.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        scratch_types={
            "refs": ring.scratch(),
            "shared": plgpu.RefUnion(
                plgpu.SMEM((COMPUTING, HALF, H), dtype, transforms=tile),
                plgpu.SMEM((COMPUTING, HALF, H), out_dtype),
            ),
            "p_s": plgpu.SMEM((COMPUTING, HALF, block) if interpret else (1,), dtype),
            "q_full": plgpu.Barrier(num_barriers=COMPUTING),
            "turn": plgpu.Barrier(num_arrivals=COMPUTING),
        },
        interpret=interpret,
    )(*operands)
