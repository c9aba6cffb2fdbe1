"""The definition of paged attention in plain jnp, and the path that runs on CPU.

`definition` gathers every row's whole cache and masks: obvious, and what all others must equal.
`attend` visits the cache in blocks of at most BLOCK tokens with an online softmax, as far as
the longest row of a group reaches, so its cost follows the tokens that exist. A block past a
row's own end adds an exact zero: a row's bits do not depend on its neighbours' lengths.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention.layout import FP8
from pallas_kernels.reach import oldest

BLOCK = 128  # cached tokens visited at once; 64 and 256 measured slower on CPU
QUERIES = 64  # queries of one prefill block
GROUP = 16  # decode rows that share a loop over blocks, and so its longest member's length
MASKED = -1e30  # finite: exp(MASKED - MASKED) must not be nan


def write(k_TKH, v_TKH, k_LPKSH, v_LPKSH, layer, page_T, slot_T, kv_scales=None):
    """Put each token's k and v into its page and slot of `layer`."""
    put = lambda cache, x: cache.at[layer, page_T, :, slot_T].set(x, mode="promise_in_bounds")
    k_TKH, v_TKH = stored(k_TKH, v_TKH, k_LPKSH.dtype, kv_scales)
    return put(k_LPKSH, k_TKH), put(v_LPKSH, v_TKH)


def stored(k_TKH, v_TKH, dtype, kv_scales):
    """k and v as a cache of `dtype` holds them."""
    if dtype != FP8:
        return k_TKH.astype(dtype), v_TKH.astype(dtype)
    most = float(jnp.finfo(FP8).max)  # a cast turns what is larger into nan
    cut = lambda x: jnp.clip(x, -most, most).astype(FP8)
    k_TKH, v_TKH = k_TKH.astype(jnp.float32), v_TKH.astype(jnp.float32)
    if kv_scales is not None:
        k_TKH, v_TKH = k_TKH / kv_scales.k_K[None, :, None], v_TKH / kv_scales.v_K[None, :, None]
    return cut(k_TKH), cut(v_TKH)


def definition(
    q_TNH, k_LPKSH, v_LPKSH, layer, pages_RM, kv_len_R, start_R, num_decodes, num_rows, *,
    window, scale, attention_chunk_size=None, softcap=None, sinks_N=None, alibi_N=None,
    distance_bias_NX=None, kv_scales=None,
):  # fmt: skip
    """Every token against every row's whole cache, masked to its own."""
    (T, N, H), (K, S), (R, M) = q_TNH.shape, k_LPKSH.shape[2:4], pages_RM.shape
    ones_K = jnp.ones(K, jnp.float32)

    def gather(cache, scale_K):
        x_RKnH = jnp.moveaxis(cache[layer, pages_RM], 2, 1).reshape(R, K, M * S, H)
        return x_RKnH.astype(jnp.float32) * scale_K[None, :, None, None]

    k_K, v_K = kv_scales or (ones_K, ones_K)
    k_RKnH, v_RKnH = gather(k_LPKSH, k_K), gather(v_LPKSH, v_K)
    t_T, n = jnp.arange(T), jnp.arange(M * S)
    row_T = jnp.searchsorted(start_R, t_T, side="right") - 1
    row_T = jnp.minimum(row_T, R - 1)
    pos_T = kv_len_R[row_T] - start_R[row_T + 1] + t_T
    q_TKGH = q_TNH.astype(jnp.float32).reshape(T, K, N // K, H)
    s_TKGn = jnp.einsum("TKGH,TKnH->TKGn", q_TKGH, k_RKnH[row_T]) * scale
    behind_Tn = pos_T[:, None] - n[None]
    if softcap is not None:
        s_TKGn = softcap * jnp.tanh(s_TKGn / softcap)
    if alibi_N is not None:
        s_TKGn -= alibi_N.reshape(1, K, -1, 1) * behind_Tn[:, None, None].astype(jnp.float32)
    if distance_bias_NX is not None:
        farthest = distance_bias_NX.shape[1] // 2
        bias_NTn = distance_bias_NX[:, jnp.clip(-behind_Tn, -farthest, farthest) + farthest]
        s_TKGn += jnp.moveaxis(bias_NTn.reshape(K, N // K, T, M * S), 2, 0)
    first_T = oldest(pos_T, window, attention_chunk_size)
    seen_T11n = ((behind_Tn >= 0) & (n[None] >= first_T[:, None]))[:, None, None]
    s_TKGn = jnp.where(seen_T11n, s_TKGn, -jnp.inf)
    sink_TKG1 = jnp.full((T, K, N // K, 1), -jnp.inf)
    if sinks_N is not None:
        sink_TKG1 = jnp.broadcast_to(sinks_N.reshape(1, K, -1, 1), sink_TKG1.shape)
    p_TKGn = jax.nn.softmax(jnp.concatenate([s_TKGn, sink_TKG1], -1), axis=-1)[..., :-1]
    o_TKGH = jnp.einsum("TKGn,TKnH->TKGH", p_TKGn, v_RKnH[row_T])
    return o_TKGH.reshape(T, N, H).astype(q_TNH.dtype)


def attend(
    q_TNH, k_LPKSH, v_LPKSH, layer, pages_RM, kv_len_R, start_R, num_decodes, num_rows, *,
    window, scale, decode_only, attention_chunk_size=None, softcap=None, sinks_N=None,
    alibi_N=None, distance_bias_NX=None, kv_scales=None,
):  # fmt: skip
    """Equal to `definition` on every token that is not padding."""
    (T, N, H), (K, S), M = q_TNH.shape, k_LPKSH.shape[2:4], pages_RM.shape[1]
    per_block = min(max(BLOCK // S, 1), M)  # pages of a block
    tail = -M % per_block
    pages_RM = jnp.pad(pages_RM, ((0, 0), (0, tail)))
    q_TKGH = (q_TNH.astype(jnp.float32) * scale).reshape(T, K, N // K, H)
    if kv_scales is not None:
        q_TKGH *= kv_scales.k_K[None, :, None, None]
    # A constant layer would make XLA copy that whole layer of the cache before it gathers.
    layer = lax.optimization_barrier(layer)
    per_head = lambda x_N: None if x_N is None else x_N.reshape(K, N // K, 1, 1)
    bias_KGX = None if distance_bias_NX is None else distance_bias_NX.reshape(K, N // K, -1)
    reach = (window, attention_chunk_size)
    options = (reach, softcap, per_head(sinks_N), per_head(alibi_N), bias_KGX)
    cache = (k_LPKSH, v_LPKSH, layer, per_block, options)
    o_TKGH = jnp.zeros(q_TKGH.shape, jnp.float32)
    o_TKGH = _decode_rows(o_TKGH, q_TKGH, cache, pages_RM, kv_len_R, num_decodes)
    if not decode_only:
        o_TKGH = _prefill_rows(
            o_TKGH, q_TKGH, cache, pages_RM, kv_len_R, start_R, num_decodes, num_rows
        )
    if kv_scales is not None:
        o_TKGH *= kv_scales.v_K[None, :, None, None]
    return o_TKGH.reshape(T, N, H).astype(q_TNH.dtype)


def _decode_rows(o_TKGH, q_TKGH, cache, pages_RM, kv_len_R, num_decodes):
    """Rows with one query, GROUP at a time; token r is row r's."""
    rows = min(GROUP, q_TKGH.shape[0], pages_RM.shape[0])

    def group(i, o_TKGH):
        # The last group may overlap the one before: the same rows give the same results.
        first = jnp.minimum(i * rows, min(q_TKGH.shape[0], pages_RM.shape[0]) - rows)
        cut = lambda x: lax.dynamic_slice_in_dim(x, first, rows)
        len_r = jnp.where(first + jnp.arange(rows) < num_decodes, cut(kv_len_R), 0)
        q_r1KGH = cut(q_TKGH)[:, None]
        o_r1KGH = _blocks(q_r1KGH, len_r[:, None] - 1, cache, cut(pages_RM))
        return lax.dynamic_update_slice_in_dim(o_TKGH, o_r1KGH[:, 0], first, 0)

    return lax.fori_loop(0, (num_decodes + rows - 1) // rows, group, o_TKGH)


def _prefill_rows(o_TKGH, q_TKGH, cache, pages_RM, kv_len_R, start_R, num_decodes, num_rows):
    """Rows with any number of queries, QUERIES at a time."""
    queries = min(QUERIES, q_TKGH.shape[0])
    room = ((0, queries), (0, 0), (0, 0), (0, 0))  # a row's last block reaches past the row

    def row(r, o_TKGH):
        first, end = start_R[r], start_R[r + 1]
        page_1M = lax.dynamic_slice_in_dim(pages_RM, r, 1)

        def block(i, o_TKGH):
            t = first + i * queries
            pos_1q = (kv_len_R[r] - end + t + jnp.arange(queries))[None]
            q_1qKGH = lax.dynamic_slice_in_dim(padded_TKGH, t, queries)[None]
            o_1qKGH = _blocks(q_1qKGH, jnp.minimum(pos_1q, kv_len_R[r] - 1), cache, page_1M)
            # What this writes past its row, the rows that follow write over.
            return lax.dynamic_update_slice_in_dim(o_TKGH, o_1qKGH[0], t, 0)

        return lax.fori_loop(0, (end - first + queries - 1) // queries, block, o_TKGH)

    padded_TKGH = jnp.pad(q_TKGH, room)
    return lax.fori_loop(num_decodes, num_rows, row, jnp.pad(o_TKGH, room))[: q_TKGH.shape[0]]


def _blocks(q_rqKGH, pos_rq, cache, pages_rM):
    """Online softmax over the cached blocks of r rows with q queries each, at `pos_rq`;
    a negative position sees nothing and gives zeros."""
    k_LPKSH, v_LPKSH, layer, per_block, options = cache
    reach, softcap, sinks_KG11, alibi_KG11, bias_KGX = options
    (r, q, K, G, H), S = q_rqKGH.shape, k_LPKSH.shape[3]
    size = per_block * S
    q_rKGqH = jnp.moveaxis(q_rqKGH, 1, 3)
    first_rq = jnp.where(pos_rq >= 0, oldest(pos_rq, *reach), 2**30)

    def fetch(cache_LPKSH, page_rm):
        block = cache_LPKSH[layer, page_rm].astype(jnp.float32)  # [r, m, K, S, H]
        return jnp.moveaxis(block, 2, 1).reshape(r, K, size, H)

    def step(i, carry):
        peak, total, o_rKGqH = carry
        page_rm = lax.dynamic_slice_in_dim(pages_rM, i * per_block, per_block, 1)
        k_rKnH, v_rKnH = fetch(k_LPKSH, page_rm), fetch(v_LPKSH, page_rm)
        s_rKGqn = jnp.einsum("rKGqH,rKnH->rKGqn", q_rKGqH, k_rKnH)
        key_n = i * size + jnp.arange(size)
        behind_rqn = pos_rq[..., None] - key_n[None, None]
        if softcap is not None:
            s_rKGqn = softcap * jnp.tanh(s_rKGqn / softcap)
        if alibi_KG11 is not None:
            s_rKGqn -= alibi_KG11[None] * behind_rqn[:, None, None].astype(jnp.float32)
        if bias_KGX is not None:
            farthest = bias_KGX.shape[-1] // 2
            ahead_rqn = jnp.clip(-behind_rqn, -farthest, farthest)
            s_rKGqn += jnp.moveaxis(bias_KGX[:, :, ahead_rqn + farthest], 2, 0)
        seen_rqn = (behind_rqn >= 0) & (key_n[None, None] >= first_rq[..., None])
        seen = seen_rqn[:, None, None]
        s_rKGqn = jnp.where(seen, s_rKGqn, MASKED)
        new_peak = jnp.maximum(peak, s_rKGqn.max(-1, keepdims=True))
        p_rKGqn = jnp.where(seen, jnp.exp(s_rKGqn - new_peak), 0.0)
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + p_rKGqn.sum(-1, keepdims=True)
        return new_peak, total, o_rKGqH * shrink + jnp.einsum("rKGqn,rKnH->rKGqH", p_rKGqn, v_rKnH)

    if sinks_KG11 is None:
        peak, total = jnp.full((r, K, G, q, 1), MASKED), jnp.zeros((r, K, G, q, 1))
    else:  # a sink is one more score, seen first, whose value is zero
        peak = jnp.broadcast_to(sinks_KG11[None], (r, K, G, q, 1))
        total = jnp.ones((r, K, G, q, 1))
    start = (peak, total, jnp.zeros((r, K, G, q, H)))
    # Blocks of which nobody sees anything are skipped.
    first = first_rq.min() // size
    end = (pos_rq.max() + size) // size
    _, total, o_rKGqH = lax.fori_loop(first, end, step, start)
    o_rKGqH = o_rKGqH / jnp.where(total == 0, 1.0, total)
    return jnp.moveaxis(o_rKGqH, 3, 1)
