"""The definition of causal attention over whole rows in plain jnp, and the path that runs on CPU.

`definition` holds every logit at once: obvious, and what all others must equal. `attend` visits
keys in blocks with an online softmax, and blocks that nobody sees are skipped, so it runs where
`definition` would not fit: its memory is O(T·BLOCK), its gradient's O(T·(BLOCK + V)).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.reach import oldest

BLOCK = 256  # queries, and keys, visited at once
MASKED = -1e30  # logit of a key that is not seen
FLOOR = -1e20  # where a row's largest logit starts: a masked one never comes near


def definition(
    q_BTNH, k_BTKH, v_BTKV, *, scale, causal, window, attention_chunk_size, softcap, sinks_N,
    alibi_N, lengths_B, distance_bias_NX=None,
):  # fmt: skip
    """Softmax over every key, masked."""
    (B, T, N, H), (K, V) = q_BTNH.shape, v_BTKV.shape[2:]
    q_BTKGH, k_BTKH, v_BTKV = (
        x.astype(jnp.float32) for x in (q_BTNH.reshape(B, T, K, N // K, H), k_BTKH, v_BTKV)
    )
    s_BKGts = jnp.einsum("BtKGH,BsKH->BKGts", q_BTKGH, k_BTKH) * scale
    length_B = jnp.full((B,), T) if lengths_B is None else lengths_B
    pos_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    seen_Bts = _seen(pos_BT[0], pos_BT[0], length_B, causal, window, attention_chunk_size)
    s_BKGts = _adjust(s_BKGts, pos_BT[0], pos_BT[0], softcap, alibi_N, distance_bias_NX)
    sinks_KG = None if sinks_N is None else sinks_N.reshape(1, K, N // K, 1, 1)
    s_BKGts = jnp.where(seen_Bts[:, None, None], s_BKGts, MASKED)
    if sinks_KG is not None:  # one more key, whose value is zero
        sink = jnp.broadcast_to(sinks_KG, (*s_BKGts.shape[:-1], 1))
        s_BKGts = jnp.concatenate([s_BKGts, sink], axis=-1)
    p_BKGts = jax.nn.softmax(s_BKGts, axis=-1)[..., :T]
    o_BTNV = jnp.einsum("BKGts,BsKV->BtKGV", p_BKGts, v_BTKV).reshape(B, T, N, V)
    valid_BT = pos_BT < length_B[:, None]
    return jnp.where(valid_BT[..., None, None], o_BTNV, 0.0).astype(q_BTNH.dtype)


def attend(
    q_BTNH, k_BTKH, v_BTKV, *, scale, causal, window, attention_chunk_size, softcap, sinks_N,
    alibi_N, lengths_B, distance_bias_NX=None,
):  # fmt: skip
    """Equal to `definition`, differentiable, and under vmap."""
    (B, T, N, H), (K, V) = q_BTNH.shape, v_BTKV.shape[2:]
    G, block = N // K, min(BLOCK, T)
    blocks = -(-T // block)
    length_B = jnp.full((B,), T, jnp.int32) if lengths_B is None else lengths_B
    longest = length_B.max()

    def cut(x_BTKx):
        """[blocks, B, K, ..., block, x]: heads before tokens, as the products want them."""
        x_BTKx = jnp.pad(x_BTKx, ((0, 0), (0, blocks * block - T), *[(0, 0)] * (x_BTKx.ndim - 2)))
        x_BbtKx = x_BTKx.reshape(B, blocks, block, *x_BTKx.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x_BbtKx, 1, 0), 2, -2)

    q_bBKGtH = cut(q_BTNH.reshape(B, T, K, G, H))
    k_bBKsH, v_bBKsV = cut(k_BTKH), cut(v_BTKV)
    ids = jnp.arange(blocks, dtype=jnp.int32)
    inside = jnp.arange(block, dtype=jnp.int32)
    sink_KG11 = jnp.full((K, G, 1, 1), FLOOR)
    total_KG11 = jnp.zeros((K, G, 1, 1))
    if sinks_N is not None:
        sink_KG11 = sinks_N.astype(jnp.float32).reshape(K, G, 1, 1)
        # Equal to 1, but it carries the gradient: the peak below carries none.
        total_KG11 = jnp.exp(sink_KG11 - lax.stop_gradient(sink_KG11))

    def queries(block_of_q):
        i, q_BKGtH = block_of_q
        q_BKGtH = q_BKGtH.astype(jnp.float32) * scale
        query_t = i * block + inside

        @jax.checkpoint
        def visit(carry, k_BKsH, v_BKsV, key_s):
            peak, total, o_BKGtV = carry
            s = jnp.einsum("BKGtH,BKsH->BKGts", q_BKGtH, k_BKsH.astype(jnp.float32))
            s = _adjust(s, query_t, key_s, softcap, alibi_N, distance_bias_NX)
            seen_Bts = _seen(query_t, key_s, length_B, causal, window, attention_chunk_size)
            s = jnp.where(seen_Bts[:, None, None], s, MASKED)
            new_peak = jnp.maximum(peak, lax.stop_gradient(s).max(-1, keepdims=True))
            p = jnp.exp(s - new_peak)
            shrink = jnp.exp(peak - new_peak)
            o_BKGtV = o_BKGtV * shrink
            o_BKGtV += jnp.einsum("BKGts,BKsV->BKGtV", p, v_BKsV.astype(jnp.float32))
            return new_peak, total * shrink + p.sum(-1, keepdims=True), o_BKGtV

        def keys(carry, block_of_k):
            j, k_BKsH, v_BKsV = block_of_k
            some = j * block < longest
            if causal:
                some &= j <= i
                some &= (j + 1) * block > oldest(i * block, window, attention_chunk_size)
            visited = lambda c: visit(c, k_BKsH, v_BKsV, j * block + inside)
            return lax.cond(some, visited, lambda c: c, carry), None

        rows = (B, K, G, block, 1)
        start = (
            jnp.broadcast_to(lax.stop_gradient(sink_KG11), rows),
            jnp.broadcast_to(total_KG11, rows),
            jnp.zeros((*rows[:-1], V)),
        )
        (_, total, o_BKGtV), _ = lax.scan(keys, start, (ids, k_bBKsH, v_bBKsV))
        return o_BKGtV / jnp.where(total == 0, 1.0, total)

    o_bBKGtV = lax.map(jax.checkpoint(queries), (ids, q_bBKGtH))
    o_BTNV = jnp.moveaxis(o_bBKGtV, (0, 4), (1, 2)).reshape(B, blocks * block, N, V)[:, :T]
    valid_BT = jnp.arange(T)[None] < length_B[:, None]
    return jnp.where(valid_BT[..., None, None], o_BTNV, 0.0).astype(q_BTNH.dtype)


def _seen(query_t, key_s, length_B, causal, window, attention_chunk_size):
    """[B, t, s]: which keys a query sees."""
    seen_ts = jnp.ones((query_t.size, key_s.size), bool)
    if causal:
        first_t = oldest(query_t, window, attention_chunk_size)
        seen_ts = (key_s[None] <= query_t[:, None]) & (key_s[None] >= first_t[:, None])
    return seen_ts[None] & (key_s[None, None] < length_B[:, None, None])


def _adjust(s_BKGts, query_t, key_s, softcap, alibi_N, distance_bias_NX):
    """Scaled logits under the cap, with the slopes and the table's numbers added."""
    if softcap is not None:
        s_BKGts = softcap * jnp.tanh(s_BKGts / softcap)
    if alibi_N is not None:
        slope_KG11 = alibi_N.reshape(*s_BKGts.shape[1:3], 1, 1)
        ahead_ts = (key_s[None] - query_t[:, None]).astype(jnp.float32)
        s_BKGts = s_BKGts + (slope_KG11 * ahead_ts[None, None])[None]
    if distance_bias_NX is not None:
        farthest = distance_bias_NX.shape[1] // 2
        ahead_ts = jnp.clip(key_s[None] - query_t[:, None], -farthest, farthest)
        bias_KGX = distance_bias_NX.reshape(*s_BKGts.shape[1:3], -1)
        s_BKGts = s_BKGts + bias_KGX[:, :, ahead_ts + farthest][None]
    return s_BKGts
