"""Rotary position embeddings: the frequencies of each kind, and the rotation.

Frequencies are computed once, on the host, in float32 and in the order of operations of
transformers' `modeling_rope_utils`, because at position 100,000 one rounding is an angle.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xlinfer.config import (
    DefaultRope,
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    Rope,
    TemperatureTuning,
    YarnRope,
)


def rope_frequencies(rope: Rope, head_dim: int, context_len: int) -> tuple[np.ndarray, float]:
    """Radians per position of each rotated pair [head_dim/2] float32, and the scale of cos, sin.

    `head_dim` counts the dimensions that are rotated. `context_len` matters to DynamicRope, whose
    base is that of a context of this length, and to LongRope.
    """
    match rope:
        case DefaultRope(theta=theta):
            return _powers(theta, head_dim), 1.0
        case LinearRope(theta=theta, factor=factor):
            return _powers(theta, head_dim) / np.float32(factor), 1.0
        case DynamicRope():
            return _dynamic(rope, head_dim, context_len), 1.0
        case Llama3Rope():
            return _llama3(rope, head_dim), 1.0
        case YarnRope():
            return _yarn(rope, head_dim), rope.attention_factor
        case LongRope():
            return _longrope(rope, head_dim, context_len), rope.attention_factor


def _powers(theta: float, head_dim: int) -> np.ndarray:
    exponent_h = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / np.float32(theta) ** exponent_h


def _dynamic(rope: DynamicRope, head_dim: int, context_len: int) -> np.ndarray:
    trained = rope.original_max_position_embeddings
    longest = max(context_len, trained)
    stretch = rope.factor * longest / trained - (rope.factor - 1)
    return _powers(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(rope: Llama3Rope, head_dim: int) -> np.ndarray:
    freq_h = _powers(rope.theta, head_dim)
    trained = rope.original_max_position_embeddings
    wavelength_h = 2 * math.pi / freq_h
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth_h = (trained / wavelength_h - low) / (high - low or 1.0)  # Llama 4 has no ramp
    ramp_h = (1 - smooth_h) * freq_h / rope.factor + smooth_h * freq_h
    slow_h = np.where(wavelength_h > trained / low, freq_h / rope.factor, ramp_h)
    return np.where(wavelength_h < trained / high, freq_h, slow_h).astype(np.float32)


def _yarn(rope: YarnRope, head_dim: int) -> np.ndarray:
    def dimension(rotations: float) -> float:
        """The pair that turns this often over the trained context, as a real number."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001  # a zero span would divide by zero
    ramp_h = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / span, 0, 1)
    keep_h = 1 - ramp_h  # fast pairs keep their frequency
    freq_h = _powers(rope.theta, head_dim)
    return (freq_h / rope.factor * (1 - keep_h) + freq_h * keep_h).astype(np.float32)


def _longrope(rope: LongRope, head_dim: int, context_len: int) -> np.ndarray:
    is_long = context_len > rope.original_max_position_embeddings
    factor_h = np.array(rope.long_factors if is_long else rope.short_factors, np.float32)
    exponent_h = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.float32(1) / (factor_h * np.float32(rope.theta) ** exponent_h)


Angles = tuple[Float[Array, "B T h"], Float[Array, "B T h"]]  # cos, sin of h pairs


class Positions(NamedTuple):
    """What the tokens' positions do to q and k, in the layers of one rope."""

    angles: Angles | None  # None: they are not rotated
    temperature_BT: Float[Array, "B T"] | None  # float32, of q; None: it stays


def temperatures(tuning: TemperatureTuning, pos_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """What the query at each position is multiplied by, float32."""
    steps_BT = jnp.floor((pos_BT.astype(jnp.float32) + 1) / tuning.floor_scale)
    return jnp.log1p(steps_BT) * tuning.attn_scale + 1


def rope_angles(freq_h: np.ndarray, scale: float, pos_BT: Int[Array, "B T"]) -> Angles:
    """cos and sin of each position's rotation, float32, times `scale`."""
    angle_BTh = pos_BT.astype(jnp.float32)[..., None] * jnp.asarray(freq_h)[None, None]
    return jnp.cos(angle_BTh) * scale, jnp.sin(angle_BTh) * scale


def rotate(
    x_BTNH: Float[Array, "B T N H"], angles: Angles, *, interleaved: bool
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (first half, second half) of a head's first 2h dimensions, Hugging Face's
    layout; computed in float32. The other dimensions stay. `interleaved` pairs are neighbours, and
    come out as halves: q and k alike, so that q·k is the same."""
    cos_BT1h, sin_BT1h = (a[:, :, None] for a in angles)
    rotated = 2 * cos_BT1h.shape[-1]
    x_BTNR = x_BTNH[..., :rotated].astype(jnp.float32)
    if interleaved:
        a, b = x_BTNR[..., ::2], x_BTNR[..., 1::2]
    else:
        a, b = jnp.split(x_BTNR, 2, axis=-1)
    y_BTNR = jnp.concatenate([a * cos_BT1h - b * sin_BT1h, b * cos_BT1h + a * sin_BT1h], axis=-1)
    y_BTNR = y_BTNR.astype(x_BTNH.dtype)
    if rotated == x_BTNH.shape[-1]:
        return y_BTNR
    return jnp.concatenate([y_BTNR, x_BTNH[..., rotated:]], axis=-1)
