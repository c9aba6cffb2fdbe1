"""The definition of a grouped product in plain jnp, and the path that runs on CPU.

`definition` gives every row a copy of its expert's dequantized weights: obvious, and what all
others must equal. `matmul` visits tiles of rows, each of one expert, and dequantizes that expert
alone: its cost is that of the experts that have rows.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fp8_matmul.reference import quantize_tokens
from pallas_kernels.grids import Grid, values
from pallas_kernels.grouped_matmul.metadata import row_tiles
from pallas_kernels.grouped_matmul.weights import BLOCK

ROWS = (8, 64)  # of a tile: at least, at most; 64 rows repay the dequantizing of an expert


def dequantize(w_NK, scale, zero, grid: Grid):
    """One expert's weights in float32; scale and zero without their axis of experts."""
    w = values(w_NK.astype(jnp.float32), grid)
    if scale is None:
        return w
    N, K = w.shape
    scale = scale.astype(jnp.float32)
    if w_NK.dtype == jnp.float8_e4m3fn and scale.ndim == 2:
        return w * jnp.repeat(jnp.repeat(scale, BLOCK, 0)[:N], BLOCK, 1)[:, :K]
    if scale.ndim < 2:  # of the expert, or of each output channel
        return w * jnp.broadcast_to(scale.reshape(-1, 1), w.shape)
    w_NGk = w.reshape(N, scale.shape[0], -1)
    if zero is not None:
        w_NGk = w_NGk - zero.T[..., None].astype(jnp.float32)
    return (w_NGk * scale.T[..., None]).reshape(N, K)


def rounded(x_MK, w_ENK, scale):
    """x in float32, as the product sees it: through e4m3 where weights are e4m3."""
    if w_ENK.dtype != jnp.float8_e4m3fn:
        return x_MK.astype(jnp.float32)
    K = x_MK.shape[1]
    group = BLOCK if scale.ndim == 3 else K
    q_MK, scale_MG = quantize_tokens(x_MK, group)
    return q_MK.astype(jnp.float32) * jnp.repeat(scale_MG, group, 1)[:, :K]


def definition(x_MK, w_ENK, group_sizes_E, scale, zero, grid: Grid):
    x = rounded(x_MK, w_ENK, scale)
    pick = lambda a, e: None if a is None else a[e]
    M, E = x.shape[0], w_ENK.shape[0]
    end_E = jnp.cumsum(group_sizes_E)
    expert_M = jnp.minimum(jnp.searchsorted(end_E, jnp.arange(M), side="right"), E - 1)
    row = lambda x_K, e: dequantize(w_ENK[e], pick(scale, e), pick(zero, e), grid) @ x_K
    y_MN = jax.vmap(row)(x, expert_M)
    return jnp.where((jnp.arange(M) < end_E[-1])[:, None], y_MN, 0.0).astype(x_MK.dtype)


def matmul(x_MK, w_ENK, group_sizes_E, scale, zero, base, grid: Grid):
    """Equal to `definition` for the experts from `base` on, of which there are group_sizes_E's."""
    M, N, E = x_MK.shape[0], w_ENK.shape[1], group_sizes_E.shape[0]
    least, most = ROWS
    rows = min(max(least, 1 << max(M // E - 1, 0).bit_length()), most)
    tile = row_tiles(group_sizes_E, M, rows)
    # A tile's rows may reach past the last row of all.
    x = jnp.pad(rounded(x_MK, w_ENK, scale), ((0, rows), (0, 0)))
    pick = lambda a, e: None if a is None else lax.dynamic_index_in_dim(a, e, keepdims=False)

    def step(t, y_MN):
        e, first = base + tile.expert_T[t], tile.row_T[t]
        w_NK = dequantize(pick(w_ENK, e), pick(scale, e), pick(zero, e), grid)
        y_rN = jnp.einsum("rK,NK->rN", lax.dynamic_slice_in_dim(x, first, rows), w_NK)
        old_rN = lax.dynamic_slice_in_dim(y_MN, first, rows)
        mine = (jnp.arange(rows) < tile.count_T[t])[:, None]
        y_rN = jnp.where(mine, y_rN.astype(x_MK.dtype), old_rN)
        return lax.dynamic_update_slice_in_dim(y_MN, y_rN, first, 0)

    y_MN = jnp.zeros((M + rows, N), x_MK.dtype)
    return lax.fori_loop(0, tile.expert_tiles, step, y_MN)[:M]
