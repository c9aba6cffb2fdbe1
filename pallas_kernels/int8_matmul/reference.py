"""The definitions of a matmul with int8 weights in plain jnp: the CPU path, and for XLA's
compilers the program itself: scales stay outside the product, where they fuse.
"""

import jax.numpy as jnp
from jax import lax

CONTRACT_LAST = (((1,), (1,)), ((), ()))


def quantize(x_MK):
    """int8 of each token and its scale: x is about q * scale, the largest q being 127."""
    x_MK = x_MK.astype(jnp.float32)
    peak_M1 = jnp.abs(x_MK).max(1, keepdims=True)
    scale_M1 = jnp.where(peak_M1 > 0, peak_M1, 1.0) / 127
    return jnp.round(x_MK / scale_M1).astype(jnp.int8), scale_M1


def int8_activations(x_MK, w_NK, scale_N):
    """Both sides int8, summed exactly in int32."""
    q_MK, x_scale_M1 = quantize(x_MK)
    y_MN = lax.dot_general(q_MK, w_NK, CONTRACT_LAST, preferred_element_type=jnp.int32)
    return (y_MN.astype(jnp.float32) * x_scale_M1 * scale_N[None]).astype(x_MK.dtype)


def float_activations(x_MK, w_NK, scale_N):
    """x as it is; w widens to x's dtype, which holds every int8."""
    w_NK = w_NK.astype(x_MK.dtype)
    y_MN = lax.dot_general(x_MK, w_NK, CONTRACT_LAST, preferred_element_type=jnp.float32)
    return (y_MN * scale_N[None]).astype(x_MK.dtype)
