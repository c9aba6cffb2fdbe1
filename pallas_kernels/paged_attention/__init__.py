"""Attention over a paged KV cache, for ragged batches of prefill chunks and decode rows.

T tokens of the step, row after row   R rows (sequences)   N query heads   K kv heads
G = N/K   H head_dim   L layers   P pages in the pool   S tokens per page   M pages per row
"""

from typing import Any, Literal, NamedTuple

from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention import reference

Impl = Literal["reference"]


class Pages(NamedTuple):
    """The cache of all layers, in the reference layout: a token's heads lie `S` apart."""

    k_LPKSH: Any  # a jax array, or what stands for one: a shape, a sharding
    v_LPKSH: Any


class Ragged(NamedTuple):
    """Which tokens of the step belong to which row, and where each row's cache lies.

    Row r's queries are tokens start_R[r] to start_R[r+1] of the step and the last ones of its
    kv_len_R[r] cached tokens, this step's included. The first `num_decodes` rows have one query
    each. Rows from `num_rows` on are padding, and so are tokens from start_R[num_rows] on.
    """

    pages_RM: Int[Array, "R M"]  # entries past a row's length may hold any page
    kv_len_R: Int[Array, " R"]
    start_R: Int[Array, " R+1"]
    num_decodes: Int[Array, ""]
    num_rows: Int[Array, ""]


def write_and_attend(
    q_TNH: Float[Array, "T N H"],
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    ragged: Ragged,
    *,
    window: int | Int[Array, ""],
    scale: float,
    decode_only: bool,
    impl: Impl,
) -> tuple[Float[Array, "T N H"], Pages]:
    """Write k and v of the step's tokens into `layer` of the cache, then attend to it.

    Token t goes to page page_T[t], slot slot_T[t]; padding tokens go to a page nobody reads.
    Each query sees the `window` latest tokens up to itself; `scale` multiplies q·k, softmax is
    float32. `decode_only` promises that every row has one query, token r being row r's.
    Outputs of padding tokens are finite and meaningless. The cache is updated in place when
    its buffers are donated. A named `impl` never falls back to another.
    """
    match impl:
        case "reference":
            pages = Pages(*reference.write(k_TKH, v_TKH, *pages, layer, page_T, slot_T))
            o_TNH = reference.attend(
                q_TNH, *pages, layer, *ragged, window=window, scale=scale, decode_only=decode_only
            )
    return o_TNH, pages
