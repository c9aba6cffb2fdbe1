"""The body of mosaic_tpu.py's two programs: the loop over items and blocks, and the copies.

An item is `queries` queries of one row (a decode row's only one); a block is `tokens` tokens of
its row's keys and values. One core walks its items' blocks in order, the copies of the next
`stages` - 1 blocks, of whichever items, already under way.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.mosaic_tpu_heads import Heads
from pallas_kernels.paged_attention.mosaic_tpu_program import Item, Program, over, up, within
from pallas_kernels.paged_attention.mosaic_tpu_words import WordRef
from pallas_kernels.reach import oldest


def body(pg: Program, names: tuple[str, ...], *refs) -> None:
    """One core's part. `refs` are named by `names`: scalars in SMEM, q and o the same buffer in
    HBM, so are cache and cache_out; then the scratch of `Program.scratch`."""
    ref = dict(zip(names, refs, strict=True))
    tiles, S, stages = pg.tiles, pg.S, pg.tiles.stages
    core = pl.program_id(0)
    layer, window, first_row, end_row = (ref["params"][i] for i in range(4))
    words = lambda name: WordRef(ref[name], pg.interpret)
    slot_of = lambda i: within(i, stages)
    bits = lambda r: r if pg.interpret else r.bitcast(jnp.uint32)

    # ---- items ----

    def blocks_of(row, token, count, position, old) -> Item:
        page = over(oldest(position, window, pg.attention_chunk_size), S)
        blocks = up(position + count - page * S, tiles.tokens)
        return Item(row, token, count, position, old, page, jnp.maximum(blocks, 1))

    if pg.decode:
        num_items = over(jnp.maximum(end_row - first_row - core + pg.cores - 1, 0), pg.cores)

        def item(i) -> Item:
            row = first_row + core + i * pg.cores
            length = ref["kv_len"][row]
            one = jnp.minimum(length, 1)
            return blocks_of(row, row, one, length - one, length - one)

    else:

        def list_row(row, count):
            """Note this core's items of a row; returns how many items all cores have."""
            new = ref["start"][row + 1] - ref["start"][row]
            new = jnp.where(ref["kv_len"][row] > 0, new, 0)

            def one(i, count):
                @pl.when(within(count, pg.cores) == core)
                def _():
                    ref["item_row"][over(count, pg.cores)] = row
                    ref["item_first"][over(count, pg.cores)] = i * tiles.queries

                return count + 1

            return lax.fori_loop(0, up(new, tiles.queries), one, count)

        count = lax.fori_loop(first_row, end_row, list_row, jnp.int32(0))
        num_items = over(jnp.maximum(count - core + pg.cores - 1, 0), pg.cores)

        def item(i) -> Item:
            row, first = ref["item_row"][i], ref["item_first"][i]
            token = ref["start"][row] + first
            count = jnp.minimum(ref["start"][row + 1] - token, tiles.queries)
            old = ref["kv_len"][row] - (ref["start"][row + 1] - ref["start"][row])
            return blocks_of(row, token, count, old + first, old)

    # ---- copies ----

    copy = pltpu.make_async_copy

    def span(it: Item, b):
        """Positions of a block: its first, and the end of what is needed of it."""
        first = it.page * S + b * tiles.tokens
        return first, jnp.minimum(first + tiles.tokens, it.end)

    def fetch(i, b, unit) -> None:
        """Start the copies of item i's block b, the core's unit-th."""
        it, slot = item(i), slot_of(unit)
        first, end = span(it, b)
        place = lambda start, size: (slot, pl.ds(start, size), pl.ds(0, pg.kv.C))
        sem = ref["kv_sem"].at[slot]

        def page(j, size):
            at = ref["pages"][it.row * pg.M + over(first, S) + j]
            src = ref["cache"].at[layer, at, pl.ds(0, size)]
            copy(src, ref["kv"].at[place(j * S, size)], sem).start()

        old = jnp.maximum(jnp.minimum(end, it.old) - first, 0)  # of the block, in the cache
        whole, rest = over(old, S), within(old, S)
        pl.loop(0, whole)(lambda j: page(j, S))

        @pl.when(rest > 0)
        def _():
            page(whole, rest)

        @pl.when(first + old < end)
        def _():
            size = end - first - old
            token = it.token - it.position + first + old
            copy(
                ref["new"].at[pl.ds(token, size)], bits(ref["kv"]).at[place(old, size)], sem
            ).start()

        @pl.when((b == 0) & (it.new > 0))
        def _():
            at = slot_of(i)
            src = ref["q_in_hbm"].at[pl.ds(it.token, it.new)]
            copy(src, ref["q_in"].at[at, pl.ds(0, it.new)], ref["q_sem"].at[at]).start()

    def await_tokens(name: str, sem: str, slot, count, words: int) -> None:
        """Wait until copies have brought or taken `words` words of `count` tokens."""

        @pl.when(count > 0)
        def _():
            some = ref[name].at[slot, pl.ds(0, count), pl.ds(0, words)]
            copy(some, some, ref[sem].at[slot]).wait()

    def write(it: Item, slot) -> None:
        """Start copying the new tokens of an item to their pages."""
        page = over(it.position, S)

        @pl.loop(0, jnp.where(it.new > 0, up(it.end, S) - page, 0))
        def _(j):
            first = jnp.maximum((page + j) * S, it.position)
            size = jnp.minimum((page + j + 1) * S, it.end) - first
            at = ref["pages"][it.row * pg.M + page + j]
            src = ref["new"].at[pl.ds(it.token + first - it.position, size)]
            dst = bits(ref["cache_out"]).at[layer, at, pl.ds(within(first, S), size)]
            copy(src, dst, ref["write_sem"].at[slot]).start()

    def await_item(i) -> None:
        """Wait for what item i wrote."""
        it, slot = item(i), slot_of(i)
        await_tokens("o_out", "o_sem", slot, it.new, pg.q_words)

        @pl.when(it.new > 0)
        def _():
            some = ref["new"].at[pl.ds(0, it.new)]
            copy(some, some, ref["write_sem"].at[slot]).wait()

    # ---- the loop ----

    def advance(i, b):
        last = b + 1 >= item(i).blocks
        return jnp.where(last, i + 1, i), jnp.where(last, 0, b + 1)

    def fetch_ahead(unit, ahead):
        @pl.when(ahead[0] < num_items)
        def _():
            fetch(ahead[0], ahead[1], unit)

        # Past the last item there is nothing to look up.
        return lax.cond(ahead[0] < num_items, lambda: advance(ahead[0], ahead[1]), lambda: ahead)

    head = Heads(pg, ref, words)
    head.start()
    ahead = (jnp.int32(0), jnp.int32(0))
    ahead = lax.fori_loop(0, stages - 1, fetch_ahead, ahead)

    def one_item(i, carry):
        it, place = item(i), slot_of(i)
        head.reset()

        def one_block(b, carry):
            unit, i_ahead, b_ahead = carry
            ahead = fetch_ahead(unit + stages - 1, (i_ahead, b_ahead))

            @pl.when(b == 0)
            def _():
                await_tokens("q_in", "q_sem", place, it.new, pg.q_words)
                head.load_queries(place)

            first, end = span(it, b)
            slot = slot_of(unit)
            await_tokens("kv", "kv_sem", slot, end - first, pg.kv.C)
            head.attend(it, slot, first, end, window)
            return unit + 1, *ahead

        carry = lax.fori_loop(0, it.blocks, one_block, carry)

        @pl.when(i >= stages)
        def _():
            await_item(i - stages)

        write(it, place)
        head.store_outputs(place)

        @pl.when(it.new > 0)
        def _():
            some = ref["o_out"].at[place, pl.ds(0, it.new)]
            dst = ref["o_hbm"].at[pl.ds(it.token, it.new)]
            copy(some, dst, ref["o_sem"].at[place]).start()

        return carry

    lax.fori_loop(0, num_items, one_item, (jnp.int32(0), *ahead))
    pl.loop(jnp.maximum(num_items - stages, 0), num_items)(await_item)
