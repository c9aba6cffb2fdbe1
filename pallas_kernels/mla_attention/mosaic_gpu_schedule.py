"""Divides a step's attention over the blocks of a GPU.

I items: a tile of query rows (queries x heads) of one sequence   U units: pages of an item that
one block visits   B parts: consecutive units, as many as make equal work   Z = B + 1

Where an item is cut into units depends on static shapes and on its own length: a row's bits do
not depend on its neighbours. Which block does a unit may depend on anything. What the units of a
cut item find is merged afterwards (mosaic_gpu_merge.py).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.paged_attention import Ragged

UNIT_COST = 3  # in pages: loading q and storing o. An estimate


class Items(NamedTuple):
    row_I: Int[Array, " I"]  # whose pages_RM are read
    token_I: Int[Array, " I"]  # its first query
    queries_I: Int[Array, " I"]  # 0: there is no such item; these come last
    pages_I: Int[Array, " I"]  # 0: the output is 0
    seen_I: Int[Array, " I"]  # cached tokens that the first query sees; the next sees one more


class Units(NamedTuple):
    row_U: Int[Array, " U"]
    token_U: Int[Array, " U"]
    queries_U: Int[Array, " U"]
    seen_U: Int[Array, " U"]
    begin_U: Int[Array, " U"]  # pages
    end_U: Int[Array, " U"]
    alone_U: Int[Array, " U"]  # 1: the whole of its item


class Merges(NamedTuple):
    """What is put together for each item."""

    token_I: Int[Array, " I"]
    queries_I: Int[Array, " I"]
    first_I: Int[Array, " I"]  # unit
    units_I: Int[Array, " I"]


def num_items(tokens: int, rows: int, queries: int, decode_only: bool) -> int:
    """A static bound: partly filled tiles are at most one for each row, and the padding's."""
    return tokens if decode_only else -(-tokens // queries) + rows + 1


def unit_pages(num_items: int, most_pages: int, parts: int) -> int:
    """Pages of one unit, an even number, since the kernel does them in pairs: if all items were
    as long as they can be, six units for each part, so that parts differ by little; but not below
    16 pages, which is 2.4 MB to read for each 32 KB (16 heads) to merge, unless blocks would have
    nothing to do."""
    each = num_items * most_pages / parts
    pages = max(min(max(each / 6, 16), each), 4)
    return min(2 * -(-int(pages) // 2), most_pages + most_pages % 2)


def items(ragged: Ragged, *, tokens: int, queries: int, page_size: int, decode_only: bool) -> Items:
    """Tiles of at most `queries` queries; the tokens after the last row make tiles of no pages."""
    rows = ragged.kv_len_R.shape[0]
    alive_R = jnp.arange(rows) < ragged.num_rows
    len_R = jnp.where(alive_R, ragged.kv_len_R, 0)
    if decode_only:
        index = jnp.arange(tokens, dtype=jnp.int32)
        pages_I = (len_R + page_size - 1) // page_size
        return Items(index, index, jnp.ones_like(index), pages_I, len_R)
    # The padding is one more row.
    first_S = jnp.append(ragged.start_R[:-1], ragged.start_R[ragged.num_rows])
    first_S = jnp.where(jnp.append(alive_R, True), first_S, tokens)
    end_S = jnp.append(jnp.where(alive_R, ragged.start_R[1:], tokens), tokens)
    len_S = jnp.append(len_R, 0)
    tiles_S = (end_S - first_S + queries - 1) // queries
    row_I, tile_I = _spread(tiles_S, num_items(tokens, rows, queries, decode_only))
    token_I = first_S[row_I] + tile_I * queries
    queries_I = jnp.clip(end_S[row_I] - token_I, 0, queries)
    seen_I = len_S[row_I] - (end_S[row_I] - token_I) + 1
    pages_I = (seen_I + queries_I - 1 + page_size - 1) // page_size
    pages_I = jnp.where((len_S[row_I] > 0) & (queries_I > 0), pages_I, 0)
    return Items(jnp.minimum(row_I, rows - 1), token_I, queries_I, pages_I, seen_I)


def units(
    items: Items, *, pages: int, most: int, parts: int
) -> tuple[Units, Merges, Int[Array, " Z"]]:
    """Cut each item after every `pages` pages, into `most` units at most; and where each part's
    units begin."""
    real_I = items.queries_I > 0
    units_I = jnp.where(real_I, jnp.maximum((items.pages_I + pages - 1) // pages, 1), 0)
    item_U, index_U = _spread(units_I, len(units_I) * most)
    get = lambda x_I: x_I[item_U]
    begin_U = index_U * pages
    end_U = jnp.minimum(begin_U + pages, get(items.pages_I))
    cost_U = jnp.where(index_U < get(units_I), end_U - begin_U + UNIT_COST, 0)
    middle_U = jnp.cumsum(cost_U) - (cost_U + 1) // 2
    size = jnp.maximum((cost_U.sum() + parts - 1) // parts, 1)
    part_Z = jnp.arange(parts + 1, dtype=jnp.int32)
    first_Z = ((middle_U // size)[None] < part_Z[:, None]).sum(1, dtype=jnp.int32)
    first_Z = jnp.minimum(first_Z, units_I.sum())
    found = Units(
        get(items.row_I), get(items.token_I), get(items.queries_I), get(items.seen_I),
        begin_U, end_U, (get(units_I) == 1).astype(jnp.int32),
    )  # fmt: skip
    first_I = jnp.cumsum(units_I) - units_I
    return found, Merges(items.token_I, items.queries_I, first_I, units_I), first_Z


def _spread(count_X, total: int):
    """(x, index within x) of each of `total` places when x takes count_X of them; places that
    nobody takes are of the last x, from count_X on."""
    end_X = jnp.cumsum(count_X)
    place = jnp.arange(total, dtype=jnp.int32)
    x = (end_X[None] <= place[:, None]).sum(1, dtype=jnp.int32)
    x = jnp.minimum(x, len(count_X) - 1)
    return x, place - (end_X - count_X)[x]
