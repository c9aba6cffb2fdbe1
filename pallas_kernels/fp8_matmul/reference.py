"""The definition of the FP8 product, and of how activations are rounded before it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

BLOCK = 128  # of N and of K, under one scale
LARGEST = 448.0  # of float8_e4m3fn
# A group of zeros needs a scale, and the scale of any other must not underflow.
SMALLEST_PEAK = 1e-10


def quantize_tokens(
    x_MK: Float[Array, "M K"], group: int
) -> tuple[Float8e4m3fn[Array, "M K"], Float[Array, "M G"]]:
    """x in e4m3, and the float32 scale of each token's every `group` of K: x ≈ q·scale.

    The largest value of a group becomes 448. The last group may be a partial one.
    """
    M, K = x_MK.shape
    groups = -(-K // group)
    x_MGg = jnp.pad(x_MK.astype(jnp.float32), ((0, 0), (0, groups * group - K)))
    x_MGg = x_MGg.reshape(M, groups, group)
    scale_MG = scale_of(jnp.abs(x_MGg).max(-1))
    q_MK = round_to_e4m3(x_MGg / scale_MG[..., None]).reshape(M, groups * group)
    return q_MK[:, :K], scale_MG


def scale_of(peak):
    """What maps a group's largest absolute value to e4m3's largest."""
    return jnp.maximum(peak, SMALLEST_PEAK) / LARGEST


def round_to_e4m3(x):
    """The nearest e4m3 value; past ±448, which the cast alone would make nan, ±448."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)


def quantize(x_MK, w_scale, x_scale):
    """q_MK and the scales that `w_scale`'s scheme asks of activations, [1, 1] or [M, G]."""
    if w_scale.ndim == 2:
        return quantize_tokens(x_MK, BLOCK)
    if x_scale is None:
        return quantize_tokens(x_MK, x_MK.shape[1])
    q_MK = round_to_e4m3(x_MK.astype(jnp.float32) / x_scale)
    return q_MK, x_scale.reshape(1, 1)


def dequantize(w_NK, w_scale):
    """In float32."""
    N, K = w_NK.shape
    if w_scale.ndim == 2:
        w_scale = jnp.repeat(jnp.repeat(w_scale, BLOCK, 0)[:N], BLOCK, 1)[:, :K]
    else:
        w_scale = w_scale.reshape(-1, 1)
    return w_NK.astype(jnp.float32) * w_scale


def matmul(x_MK, w_NK, w_scale, x_scale):
    q_MK, scale_MG = quantize(x_MK, w_scale, x_scale)
    q_MK = q_MK.astype(jnp.float32)
    if w_scale.ndim == 2:
        x_MK_ = q_MK * jnp.repeat(scale_MG, BLOCK, 1)[:, : x_MK.shape[1]]
        return (x_MK_ @ dequantize(w_NK, w_scale).T).astype(x_MK.dtype)
    y_MN = q_MK @ w_NK.astype(jnp.float32).T * scale_MG * w_scale.reshape(1, -1)
    return y_MN.astype(x_MK.dtype)


def float_activations(x_MK, w_NK, w_scale):
    return (x_MK.astype(jnp.float32) @ dequantize(w_NK, w_scale).T).astype(x_MK.dtype)
