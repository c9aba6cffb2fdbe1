"""How the cache lies in memory, and which tokens of a step belong to which row of it.

T tokens of the step, row after row   R rows (sequences)   N query heads   K kv heads
G = N/K   H head_dim   L layers   P pages in the pool   S tokens per page   M pages per row
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FP8 = jnp.dtype(jnp.float8_e4m3fn)  # the 8-bit cache: largest value 448, no infinity


class Pages(NamedTuple):
    """The cache of all layers for the reference and for GPUs: a page of one head is one
    [S, H] block, which is what one bulk copy (TMA) fetches."""

    k_LPKSH: Any  # a jax array, or what stands for one: a shape, a sharding
    v_LPKSH: Any


class PackedPages(NamedTuple):
    """The cache of all layers for TPUs: k and v of a token side by side in rows of C*p heads, p of
    them in one 32-bit word, so that a page is one contiguous block (mosaic_tpu.py)."""

    kv_LPSCpH: Any


class Ragged(NamedTuple):
    """Which tokens of the step belong to which row, and where each row's cache lies.

    Row r's queries are tokens start_R[r] to start_R[r+1] of the step and the last ones of its
    kv_len_R[r] cached tokens, this step's included. The first `num_decodes` rows have one query
    each. Rows from `num_rows` on are padding, and so are tokens from start_R[num_rows] on; a row
    with a kv_len of 0 is skipped.
    """

    pages_RM: Int[Array, "R M"]  # entries past a row's length may hold any page
    kv_len_R: Int[Array, " R"]
    start_R: Int[Array, " R+1"]
    num_decodes: Int[Array, ""]
    num_rows: Int[Array, ""]


class Scales(NamedTuple):
    """Of an 8-bit cache: a stored number is the value over its kv head's scale."""

    k_K: Float[Array, " K"]
    v_K: Float[Array, " K"]


def in_parts(ragged: Ragged, tokens: int, parts: int) -> Ragged:
    """`ragged` as each of `parts` equal parts of the step's `tokens` sees it, along a new first
    axis: the rows that have tokens there, and of a row that goes on after the part what comes
    before its end, which the cache must hold where the part's own keys and values do not."""
    size, R = tokens // parts, ragged.kv_len_R.shape[0]
    i = jnp.arange(min(R, size) + 1)  # a part has no more rows than tokens

    def part(first):
        skipped = (ragged.start_R[1:] <= first).sum(dtype=jnp.int32)  # rows before it
        start_r = ragged.start_R[jnp.minimum(skipped + i, R)]
        row_r = jnp.minimum(skipped + i[:-1], R - 1)
        later_r = jnp.maximum(start_r[1:] - (first + size), 0)
        is_here_r = (start_r[:-1] < first + size) & (skipped + i[:-1] < R)
        of_part = lambda count: jnp.clip(count - skipped, 0, len(i) - 1)
        return Ragged(
            ragged.pages_RM[row_r],
            jnp.where(is_here_r, ragged.kv_len_R[row_r] - later_r, 0),
            jnp.clip(start_r - first, 0, size),
            of_part(ragged.num_decodes),
            of_part(ragged.num_rows),
        )

    return jax.vmap(part)(jnp.arange(parts, dtype=jnp.int32) * size)
