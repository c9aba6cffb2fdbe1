"""Paged attention for Hopper: the step's k and v into the cache, then two kernels.

Rows with one query go to mosaic_gpu_decode.py, which memory bandwidth bounds, rows with more to
mosaic_gpu_prefill.py, which the matrix units bound. Each wants the queries of a kv head together,
so that a tile of them is one contiguous piece; XLA fuses these copies with whatever makes q.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import Device
from pallas_kernels.paged_attention.layout import FP8, Pages, Ragged
from pallas_kernels.paged_attention.mosaic_gpu_blocks import LOG2E, compute_dtype
from pallas_kernels.paged_attention.mosaic_gpu_decode import decode
from pallas_kernels.paged_attention.mosaic_gpu_prefill import TILE, prefill
from pallas_kernels.paged_attention.mosaic_gpu_tiles import best_decode, best_prefill
from pallas_kernels.paged_attention.reference import stored
from pallas_kernels.paged_attention.tiles import PhaseTiles, Shape

PAGE_SIZES = (16, 32, 64, 128)
DTYPES = (jnp.bfloat16, jnp.float16, FP8)
MOST_GROUP = 64  # query heads of a kv head


def refuse(
    *, page_size: int, head_dim: int, dtype: Any, distance_bias: bool, apart: bool
) -> str | None:
    """Why the kernels do not take such a cache, or what they are to do with it; None: they do."""
    if distance_bias:
        return "they add no bias by distance (distance_bias_NX), as the reference does"
    if page_size not in PAGE_SIZES:
        return f"page_size is {page_size}; it must be one of {PAGE_SIZES}"
    if head_dim % 16 or not 64 <= head_dim <= 256:
        return f"head_dim is {head_dim}; it must be a multiple of 16 from 64 to 256"
    if jnp.dtype(dtype) not in map(jnp.dtype, DTYPES):
        return f"dtype is {jnp.dtype(dtype)}; it must be bfloat16, float16 or {FP8}"
    return None


def write_and_attend(
    q_TNH, k_TKH, v_TKH, pages: Pages, layer, page_T, slot_T, ragged: Ragged, *, window,
    attention_chunk_size, scale, decode_only, softcap, sinks_N, alibi_N, kv_scales, device: Device,
    interpret: Any, tiles: PhaseTiles,
):  # fmt: skip
    pages = write(k_TKH, v_TKH, pages, layer, page_T, slot_T, kv_scales)
    o_TNH = attend(
        q_TNH, pages, layer, ragged, window=window, attention_chunk_size=attention_chunk_size,
        scale=scale, decode_only=decode_only, softcap=softcap, sinks_N=sinks_N, alibi_N=alibi_N,
        kv_scales=kv_scales, device=device, interpret=interpret, tiles=tiles,
    )  # fmt: skip
    return o_TNH, pages


def write(k_TKH, v_TKH, pages: Pages, layer, page_T, slot_T, kv_scales) -> Pages:
    new = stored(k_TKH, v_TKH, pages.k_LPKSH.dtype, kv_scales)
    # Padding tokens share a place, but nobody reads it: the others' are unique, and plain stores
    # are many times faster than the atomic ones that XLA otherwise makes of a scatter.
    put = lambda cache, x_TKH: cache.at[layer, page_T, :, slot_T].set(
        x_TKH, mode="promise_in_bounds", unique_indices=True
    )
    return Pages(*map(put, pages, new))


def attend(
    q_TNH, pages: Pages, layer, ragged: Ragged, *, window, attention_chunk_size, scale, decode_only,
    softcap, sinks_N, alibi_N, kv_scales, device: Device, interpret: Any, tiles: PhaseTiles,
):  # fmt: skip
    (T, N, H), K = q_TNH.shape, pages.k_LPKSH.shape[2]
    G = N // K
    if G > MOST_GROUP:
        raise ValueError(
            f"q_TNH has {G} heads for each kv head; impl mosaic_gpu takes up to {MOST_GROUP}"
        )
    kv_dtype = pages.k_LPKSH.dtype
    shape = Shape(N, K, H, pages.k_LPKSH.shape[3], q_TNH.dtype, kv_dtype)
    q_TKGH = _queries(q_TNH, K, compute_dtype(kv_dtype))
    heads_KG4 = _per_head(N, K, scale, kv_scales, sinks_N, alibi_N)
    options = {
        "window": window, "attention_chunk_size": attention_chunk_size, "softcap": softcap,
        "alibi": alibi_N is not None, "sinks": sinks_N is not None, "dtype": q_TNH.dtype,
        "interpret": interpret or None,
    }  # fmt: skip
    R = min(T, ragged.pages_RM.shape[0])
    o_RNH = decode(
        jnp.pad(q_TKGH[:R], ((0, 0), (0, 0), (0, -G % 8), (0, 0))), *pages, layer, ragged,
        jnp.pad(heads_KG4, ((0, 0), (0, -G % 8), (0, 0))).transpose(0, 2, 1),
        G=G, tiles=tiles.decode or best_decode(shape, R, device), **options,
    )  # fmt: skip
    if decode_only:
        return o_RNH
    q_KXH = jnp.pad(
        q_TKGH.transpose(1, 0, 2, 3).reshape(K, T * G, H), ((0, 0), (0, TILE + -T * G % 8), (0, 0))
    )
    o_TNH = prefill(
        q_KXH, *pages, layer, ragged, heads_KG4,
        T=T, tiles=tiles.prefill or best_prefill(shape, T, device), **options,
    )  # fmt: skip
    # Prefill wrote every token but the decode rows'; theirs are among the first R. Without the
    # barrier XLA tries to fuse the update with the kernel's call, and fails.
    o_TNH = jax.lax.optimization_barrier(o_TNH)
    decoded_R = jnp.arange(R) < ragged.num_decodes
    return o_TNH.at[:R].set(jnp.where(decoded_R[:, None, None], o_RNH, o_TNH[:R]))


def _queries(q_TNH: jax.Array, K: int, dtype: Any) -> jax.Array:
    """q_TKGH in the products' dtype. float16 holds every query that bfloat16 does but for those
    above 65504, which are cut, and what lies under 6e-8, which moves no score by more."""
    T, N, H = q_TNH.shape
    if dtype == jnp.float16 and q_TNH.dtype != dtype:
        most = float(jnp.finfo(dtype).max)
        q_TNH = jnp.clip(q_TNH, -most, most).astype(dtype)
    return q_TNH.reshape(T, K, N // K, H)


def _per_head(N: int, K: int, scale: float, kv_scales, sinks_N, alibi_N) -> jax.Array:
    """[K, G, 4], float32: what q·k is multiplied by, what the output is, the sink and the slope;
    scores are in units of log 2 throughout, since exp2 is what the chip has."""
    one_N, zero_N = jnp.ones(N, jnp.float32), jnp.zeros(N, jnp.float32)
    k_N = v_N = one_N
    if kv_scales is not None:
        k_N, v_N = (jnp.repeat(x_K, N // K) for x_K in kv_scales)
    sink_N = zero_N if sinks_N is None else sinks_N * LOG2E
    slope_N = zero_N if alibi_N is None else alibi_N * LOG2E
    table_N4 = jnp.stack([k_N * (scale * LOG2E), v_N, sink_N, slope_N], 1)
    return table_N4.reshape(K, N // K, 4)
