"""The definition of latent attention in plain jnp, and the path that runs on CPU.

`definition` gathers every row's whole cache and masks: obvious, and what all others must equal.
`attend` visits the cache in blocks of at most BLOCK tokens with an online softmax, as far as
the longest row of a group reaches, so its cost follows the tokens that exist. A block past a
row's own end adds an exact zero: a row's bits do not depend on its neighbours' lengths.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # cached tokens visited at once
QUERIES = 16  # queries of one prefill block
GROUP = 16  # decode rows that share a loop over blocks, and so its longest member's length
MASKED = -1e30  # finite: exp(MASKED - MASKED) must not be nan


def token(latent_TC, rope_TH, dtype, kv_scale):
    """What the cache holds of each token; an 8-bit number is cut to the largest there is."""
    kv_TD = jnp.concatenate([latent_TC, rope_TH], axis=1)
    if kv_scale is not None:
        kv_TD = kv_TD.astype(jnp.float32) / kv_scale
    if jnp.dtype(dtype).itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        kv_TD = jnp.clip(kv_TD.astype(jnp.float32), -largest, largest)
    return kv_TD.astype(dtype)


def write(latent_TC, rope_TH, kv_LPSD, layer, page_T, slot_T, kv_scale):
    """Put each token's latent and rope into its page and slot of `layer`."""
    kv_TD = token(latent_TC, rope_TH, kv_LPSD.dtype, kv_scale)
    return kv_LPSD.at[layer, page_T, slot_T].set(kv_TD, mode="promise_in_bounds")


def definition(
    q_TNC, q_TNH, kv_LPSD, layer, pages_RM, kv_len_R, start_R, num_decodes, num_rows, *,
    scale, kv_scale,
):  # fmt: skip
    """Every token against every row's whole cache, masked to its own."""
    (T, _, C), R = q_TNC.shape, pages_RM.shape[0]
    kv_RnD = kv_LPSD[layer, pages_RM].reshape(R, -1, kv_LPSD.shape[-1]).astype(jnp.float32)
    kv_RnD = kv_RnD * (1.0 if kv_scale is None else kv_scale)
    t_T, n = jnp.arange(T), jnp.arange(kv_RnD.shape[1])
    row_T = jnp.minimum(jnp.searchsorted(start_R, t_T, side="right") - 1, R - 1)
    pos_T = kv_len_R[row_T] - start_R[row_T + 1] + t_T
    q_TND = jnp.concatenate([q_TNC, q_TNH], axis=2).astype(jnp.float32)
    s_TNn = jnp.einsum("TND,TnD->TNn", q_TND, kv_RnD[row_T]) * scale
    seen_T1n = (pos_T[:, None] >= n[None])[:, None]
    p_TNn = jax.nn.softmax(s_TNn, axis=-1, where=seen_T1n)
    return jnp.einsum("TNn,TnC->TNC", p_TNn, kv_RnD[row_T, :, :C]).astype(q_TNC.dtype)


def attend(
    q_TNC, q_TNH, kv_LPSD, layer, pages_RM, kv_len_R, start_R, num_decodes, num_rows, *,
    scale, decode_only, kv_scale,
):  # fmt: skip
    """Equal to `definition` on every token that is not padding."""
    (T, N, C), S, M = q_TNC.shape, kv_LPSD.shape[2], pages_RM.shape[1]
    per_block = min(max(BLOCK // S, 1), M)  # pages of a block
    pages_RM = jnp.pad(pages_RM, ((0, 0), (0, -M % per_block)))
    one = jnp.float32(1.0) if kv_scale is None else kv_scale
    q_TND = jnp.concatenate([q_TNC, q_TNH], axis=2).astype(jnp.float32) * (scale * one)
    # A constant layer would make XLA copy that whole layer of the cache before it gathers.
    cache = (kv_LPSD, lax.optimization_barrier(layer), per_block)
    o_TNC = jnp.zeros((T, N, C), jnp.float32)
    o_TNC = _decode_rows(o_TNC, q_TND, cache, pages_RM, kv_len_R, num_decodes)
    if not decode_only:
        o_TNC = _prefill_rows(
            o_TNC, q_TND, cache, pages_RM, kv_len_R, start_R, num_decodes, num_rows
        )
    return (o_TNC * one).astype(q_TNC.dtype)


def _decode_rows(o_TNC, q_TND, cache, pages_RM, kv_len_R, num_decodes):
    """Rows with one query, GROUP at a time; token r is row r's."""
    most = min(q_TND.shape[0], pages_RM.shape[0])
    rows = min(GROUP, most)

    def group(i, o_TNC):
        # The last group may overlap the one before: the same rows give the same results.
        first = jnp.minimum(i * rows, most - rows)
        cut = lambda x: lax.dynamic_slice_in_dim(x, first, rows)
        alive_r = first + jnp.arange(rows) < num_decodes
        len_r = jnp.where(alive_r, cut(kv_len_R), 0)
        o_r1NC = _blocks(
            cut(q_TND)[:, None], len_r[:, None] - 1, cache, cut(pages_RM), o_TNC.shape[2]
        )
        return lax.dynamic_update_slice_in_dim(o_TNC, o_r1NC[:, 0], first, 0)

    return lax.fori_loop(0, (num_decodes + rows - 1) // rows, group, o_TNC)


def _prefill_rows(o_TNC, q_TND, cache, pages_RM, kv_len_R, start_R, num_decodes, num_rows):
    """Rows with any number of queries, QUERIES at a time."""
    queries, C = min(QUERIES, q_TND.shape[0]), o_TNC.shape[2]
    room = ((0, queries), (0, 0), (0, 0))  # a row's last block reaches past the row

    def row(r, o_TNC):
        first, end = start_R[r], start_R[r + 1]
        page_1M = lax.dynamic_slice_in_dim(pages_RM, r, 1)

        def block(i, o_TNC):
            t = first + i * queries
            pos_1q = (kv_len_R[r] - end + t + jnp.arange(queries))[None]
            q_1qND = lax.dynamic_slice_in_dim(padded_TND, t, queries)[None]
            pos_1q = jnp.minimum(pos_1q, kv_len_R[r] - 1)
            o_1qNC = _blocks(q_1qND, pos_1q, cache, page_1M, C)
            # What this writes past its row, the rows that follow write over.
            return lax.dynamic_update_slice_in_dim(o_TNC, o_1qNC[0], t, 0)

        return lax.fori_loop(0, (end - first + queries - 1) // queries, block, o_TNC)

    padded_TND = jnp.pad(q_TND, room)
    return lax.fori_loop(num_decodes, num_rows, row, jnp.pad(o_TNC, room))[: q_TND.shape[0]]


def _blocks(q_rqND, pos_rq, cache, pages_rM, C):
    """Online softmax over the cached blocks of r rows with q queries each, at `pos_rq`;
    a negative position sees nothing and gives zeros."""
    kv_LPSD, layer, per_block = cache
    (r, q, N, D), size = q_rqND.shape, per_block * kv_LPSD.shape[2]

    def step(i, carry):
        peak, total, o_rqNC = carry
        page_rm = lax.dynamic_slice_in_dim(pages_rM, i * per_block, per_block, 1)
        kv_rnD = kv_LPSD[layer, page_rm].astype(jnp.float32).reshape(r, size, D)
        s_rqNn = jnp.einsum("rqND,rnD->rqNn", q_rqND, kv_rnD)
        n_11n = (i * size + jnp.arange(size))[None, None]
        seen = (pos_rq[..., None] >= n_11n)[:, :, None]
        s_rqNn = jnp.where(seen, s_rqNn, MASKED)
        new_peak = jnp.maximum(peak, s_rqNn.max(-1, keepdims=True))
        p_rqNn = jnp.where(seen, jnp.exp(s_rqNn - new_peak), 0.0)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + p_rqNn.sum(-1, keepdims=True)
        o_rqNC = o_rqNC * shrink + jnp.einsum("rqNn,rnC->rqNC", p_rqNn, kv_rnD[..., :C])
        return new_peak, total, o_rqNC

    start = (
        jnp.full((r, q, N, 1), MASKED),
        jnp.zeros((r, q, N, 1)),
        jnp.zeros((r, q, N, C)),
    )
    _, total, o_rqNC = lax.fori_loop(0, (pos_rq.max() + size) // size, step, start)
    return o_rqNC / jnp.where(total == 0, 1.0, total)
