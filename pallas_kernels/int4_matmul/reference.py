"""The definition of a matmul with grouped integer weights in plain jnp, and the CPU path."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.grids import Grid, values


def dequantize(w_NK, scale_GN, zero_GN, grid: Grid):
    """(w - zero) * scale in float32, of what w stands for; row g of scale and zero holds for
    columns g*K/G on."""
    (N, K), G = w_NK.shape, scale_GN.shape[0]
    w_NGk = values(w_NK.astype(jnp.float32), grid).reshape(N, G, K // G)
    if zero_GN is not None:
        w_NGk = w_NGk - zero_GN.T[..., None].astype(jnp.float32)
    return (w_NGk * scale_GN.T[..., None].astype(jnp.float32)).reshape(N, K)


def matmul(x_MK, w_NK, scale_GN, zero_GN, grid: Grid):
    """x @ dequantize(w).T, summed in float32."""
    w = dequantize(w_NK, scale_GN, zero_GN, grid)
    return jnp.einsum("MK,NK->MN", x_MK.astype(jnp.float32), w).astype(x_MK.dtype)


def narrow_matmul(x_MK, w_NK, scale_GN, zero_GN, grid: Grid):
    """What XLA is given on accelerators: weights rounded to x's dtype, for its matrix units."""
    w = dequantize(w_NK, scale_GN, zero_GN, grid).astype(x_MK.dtype)
    contract_last = (((1,), (1,)), ((), ()))
    y_MN = lax.dot_general(x_MK, w, contract_last, preferred_element_type=jnp.float32)
    return y_MN.astype(x_MK.dtype)
