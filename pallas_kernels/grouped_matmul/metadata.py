"""Which rows belong together: small tables computed from the group sizes before a kernel starts.

Padding rows are one more group, number E. Sums over masks stand for cumulative sums and
searches: XLA makes a single small kernel of each.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp


class RowTiles(NamedTuple):
    """Tiles of consecutive rows, each for one group; padding's come last.

    Entries from `tiles` on are meaningless.
    """

    expert_T: Any
    row_T: Any  # where the tile starts: at its group's first row, or less than `align` before
    first_T: Any  # of the tile's rows, the first of the group
    count_T: Any  # of them from there on
    tiles: Any
    expert_tiles: Any  # tiles that are not padding's


class Groups(NamedTuple):
    """Where each group's rows lie; the last group is the padding."""

    size_E1: Any
    start_E1: Any
    end_E1: Any


def groups(group_sizes_E, M: int) -> Groups:
    """The experts' groups and the padding's."""
    size_E1 = jnp.append(group_sizes_E, M - group_sizes_E.sum(dtype=jnp.int32))
    end_E1 = running_sum(size_E1)
    return Groups(size_E1, end_E1 - size_E1, end_E1)


def most_tiles(M: int, E: int, rows: int, align: int = 1) -> int:
    """The most tiles that E groups and the padding can need."""
    return min(M, (M + (E + 1) * (rows - 1 + align - 1)) // rows)


def row_tiles(group_sizes_E, M: int, rows: int, align: int = 1) -> RowTiles:
    """All rows in tiles of `rows` rows that start at multiples of `align`."""
    E = group_sizes_E.shape[0]
    size_E1, start_E1, end_E1 = groups(group_sizes_E, M)
    start_E1 = start_E1 - start_E1 % align
    tiles_E1 = jnp.where(size_E1 > 0, (end_E1 - start_E1 + rows - 1) // rows, 0)
    last_E1 = running_sum(tiles_E1)  # one past a group's last tile
    t_T = jnp.arange(most_tiles(M, E, rows, align), dtype=jnp.int32)
    expert_T = jnp.minimum(count_at_most(last_E1, t_T), E)
    row_T = start_E1[expert_T] + (t_T - (last_E1 - tiles_E1)[expert_T]) * rows
    first_T = jnp.maximum((end_E1 - size_E1)[expert_T] - row_T, 0)
    count_T = jnp.minimum(end_E1[expert_T] - row_T, rows) - first_T
    return RowTiles(expert_T, row_T, first_T, count_T, last_E1[-1], last_E1[-2])


def running_sum(x_E):
    """x_E[0] + … + x_E[e] for every e."""
    e = jnp.arange(x_E.shape[0])
    return jnp.where(e[None] <= e[:, None], x_E[None], 0).sum(1, dtype=jnp.int32)


def count_at_most(x_E, bound_T):
    """How many of x_E are at most each bound."""
    return (x_E[None] <= bound_T[:, None]).sum(1, dtype=jnp.int32)


class Visits(NamedTuple):
    """Tiles at multiples of their rows, once for each group that has rows in them, in order.

    Padding visits only tiles that are all padding. Entries from `visits` on are meaningless.
    """

    expert_V: Any  # E for padding
    weights_V: Any  # the expert whose weights are at hand: padding keeps the last one's
    tile_V: Any
    first_V: Any  # of the tile's rows, the first of the group; 0 if this visit is the tile's first
    end_V: Any
    visits: Any


def tile_visits(group_sizes_E, M: int, rows: int) -> Visits:
    E = group_sizes_E.shape[0]
    size_E1, start_E1, end_E1 = groups(group_sizes_E, M)
    is_padding_E1 = jnp.arange(E + 1) == E
    tile_E1 = jnp.where(is_padding_E1, start_E1 + rows - 1, start_E1) // rows
    visits_E1 = jnp.where(size_E1 > 0, (end_E1 + rows - 1) // rows - tile_E1, 0)
    last_E1 = running_sum(visits_E1)
    v_V = jnp.arange(-(-M // rows) + min(E, M), dtype=jnp.int32)
    expert_V = jnp.minimum(count_at_most(last_E1, v_V), E)
    tile_V = tile_E1[expert_V] + v_V - (last_E1 - visits_E1)[expert_V]
    last_used = jnp.max(jnp.where(group_sizes_E > 0, jnp.arange(E, dtype=jnp.int32), 0))
    return Visits(
        expert_V,
        jnp.minimum(expert_V, last_used),
        # Never past the last tile, though nobody visits the entries that would be.
        jnp.minimum(tile_V, (M - 1) // rows),
        jnp.maximum(start_E1[expert_V] - tile_V * rows, 0),
        jnp.minimum(end_E1[expert_V] - tile_V * rows, rows),
        last_E1[-1],
    )
