"""Blocks of GGUF, as their bytes lie in the file -> small integers, scales and zeros, on device.

Nothing is quantized anew: each number and each scale is the block's own. One function for each
type of block, written like the block itself: what its bytes hold, from first to last.

N outputs   K inputs   G groups of K/G inputs   B blocks of a row
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8


class Rows(NamedTuple):
    """w = (data - zero) * scale, of each group; of IQ4_NL, IQ4_XS and MXFP4, the number that the
    code `data` stands for, times scale: of MXFP4 twice its E2M1 value, as its scales are half.

    Where there is a zero the block has scale * data - minimum instead: with zero = minimum / scale
    in float32, w is within 2^-22 (|scale * data| + |minimum|) of that. A group of scale 0, which is
    -minimum throughout, becomes data 0, zero 1 or -1, scale |minimum|: exact.
    """

    data: Int8[Array, "*L N K"]
    scale: Float[Array, "*L N G"]
    zero: Float[Array, "*L N G"] | None


def unpack(raw: UInt8[Array, "*L N R"], kind: str) -> Rows:
    """Rows of R bytes of blocks of type `kind`, one of TYPES.

    Raises ValueError for another type, and where blocks do not make up a row.
    """
    if kind not in TYPES:
        raise ValueError(f"blocks of type {kind!r}; xlinfer unpacks {', '.join(TYPES)}")
    nbytes, read = TYPES[kind]
    if raw.shape[-1] % nbytes:
        raise ValueError(f"rows of {raw.shape[-1]} bytes are not made of {kind} blocks of {nbytes}")
    group = read(raw.reshape(*raw.shape[:-1], -1, nbytes))
    data, scale, zero = group.data.astype(jnp.int8), group.scale, None
    if group.minimum is not None:
        data, scale, zero = _with_zero(data, scale, group.minimum)
    rows = lambda x: x.reshape(*raw.shape[:-1], -1)
    return Rows(rows(data), rows(scale), None if zero is None else rows(zero))


@dataclass(frozen=True)
class Groups:
    """scale * data - minimum, of the groups of each block."""

    data: Array  # [*L N B groups inputs]
    scale: Array  # [*L N B groups] float32
    minimum: Array | None = None


def _with_zero(data: Array, scale: Array, minimum: Array) -> tuple[Array, Array, Array]:
    flat = scale == 0
    zero = jnp.where(flat, jnp.sign(minimum), minimum / jnp.where(flat, 1.0, scale))
    return (
        jnp.where(flat[..., None], jnp.int8(0), data),
        jnp.where(flat, jnp.abs(minimum), scale),
        zero,
    )


def _cut(block: Array, *sizes: int) -> list[Array]:
    """Fields of so many bytes, one after the other."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert ends[-1] == block.shape[-1], (sizes, block.shape)
    return jnp.split(block, ends[:-1], axis=-1)


def _half(field: Array) -> Array:
    """[..., 2] bytes of a float16 -> [..., 1] float32."""
    return jax.lax.bitcast_convert_type(field, jnp.float16).astype(jnp.float32)[..., None]


def _scaled(field: Array, numbers: Array) -> Array:
    """A float16 of 2 bytes times each of the block's numbers: exact in float32."""
    return _half(field) * numbers.astype(jnp.float32)


def _bits(field: Array, width: int) -> Array:
    """Numbers of `width` bits, [..., n] bytes -> [..., 8/width, n]: all that the lowest bits hold
    first."""
    mask = jnp.uint8(2**width - 1)
    return jnp.stack([field >> jnp.uint8(at) & mask for at in range(0, 8, width)], axis=-2)


def _groups(values: Array, size: int, axes: int = 1) -> Array:
    """The last axes after the block's as groups of `size`."""
    return values.reshape(*values.shape[: values.ndim - axes], -1, size)


def _signed(values: Array, offset: int) -> Array:
    return values.astype(jnp.int8) - jnp.int8(offset)


def _nibbles(field: Array) -> Array:
    """16 bytes -> one group of 32: the low halves, then the high ones."""
    return _groups(_bits(field, 4), 32, 2)


def _fifth_bits(field: Array) -> Array:
    """4 bytes -> one group of 32 bits, in order, each worth 16."""
    return _groups(_bits(field, 1).swapaxes(-1, -2), 32, 2) << jnp.uint8(4)


def _q4_0(block):
    d, q = _cut(block, 2, 16)
    return Groups(_signed(_nibbles(q), 8), _half(d))


def _q4_1(block):
    d, m, q = _cut(block, 2, 2, 16)
    return Groups(_nibbles(q), _half(d), -_half(m))


def _q5_0(block):
    d, high, low = _cut(block, 2, 4, 16)
    return Groups(_signed(_nibbles(low) | _fifth_bits(high), 16), _half(d))


def _q5_1(block):
    d, m, high, low = _cut(block, 2, 2, 4, 16)
    return Groups(_nibbles(low) | _fifth_bits(high), _half(d), -_half(m))


def _q8_0(block):
    d, q = _cut(block, 2, 32)
    return Groups(_groups(jax.lax.bitcast_convert_type(q, jnp.int8), 32), _half(d))


def _q2_k(block):
    scales, q, d, dmin = _cut(block, 16, 64, 2, 2)
    scale, minimum = (scales & jnp.uint8(15)), scales >> jnp.uint8(4)
    data = _bits(_groups(q, 32), 2)  # halves of the block, four quarters in each
    return Groups(_groups(data, 16, 3), _scaled(d, scale), _scaled(dmin, minimum))


def _q3_k(block):
    high, low, scales, d = _cut(block, 32, 64, 12, 2)
    data = _groups(_bits(_groups(low, 32), 2), 16, 3)
    third = _groups(_bits(high, 1), 16, 2) << jnp.uint8(2)
    four, two = _cut(scales, 8, 4)
    scale = _groups(_bits(four, 4), 16, 2) | _groups(_bits(two, 2), 16, 2) << jnp.uint8(4)
    return Groups(_signed(data | third, 4), _scaled(d, _signed(scale[..., 0, :], 32)))


def _scales_and_minima(field: Array, d: Array, dmin: Array) -> tuple[Array, Array]:
    """Of Q4_K and Q5_K: 8 of 6 bits each in 12 bytes. Those of the first four groups have their
    bytes, whose upper two bits belong to the last four."""
    scale, minimum, low = jnp.split(field, 3, axis=-1)
    six = lambda first, last: jnp.concatenate(
        [first & jnp.uint8(63), last | (first >> jnp.uint8(2)) & jnp.uint8(48)], axis=-1
    )
    scale, minimum = six(scale, low & jnp.uint8(15)), six(minimum, low >> jnp.uint8(4))
    return _scaled(d, scale), _scaled(dmin, minimum)


def _q4_k(block):
    d, dmin, scales, q = _cut(block, 2, 2, 12, 128)
    data = _groups(_bits(_groups(q, 32), 4), 32, 3)
    return Groups(data, *_scales_and_minima(scales, d, dmin))


def _q5_k(block):
    d, dmin, scales, high, low = _cut(block, 2, 2, 12, 32, 128)
    data = _groups(_bits(_groups(low, 32), 4), 32, 3) | _bits(high, 1) << jnp.uint8(4)
    return Groups(data, *_scales_and_minima(scales, d, dmin))


def _q6_k(block):
    low, high, scale, d = _cut(block, 128, 64, 16, 2)
    data = _groups(_bits(_groups(low, 64), 4), 16, 3)
    data |= _groups(_bits(_groups(high, 32), 2), 16, 3) << jnp.uint8(4)
    return Groups(_signed(data, 32), _scaled(d, jax.lax.bitcast_convert_type(scale, jnp.int8)))


def _iq4_nl(block):
    d, q = _cut(block, 2, 16)
    return Groups(_nibbles(q), _half(d))


def _iq4_xs(block):
    d, high, low, q = _cut(block, 2, 2, 4, 128)
    in_order = lambda bits: _groups(bits.swapaxes(-1, -2), 8, 2)[..., 0, :]
    scale = in_order(_bits(low, 4)) | in_order(_bits(high, 2)) << jnp.uint8(4)
    return Groups(
        _groups(_bits(_groups(q, 16), 4), 32, 3), _scaled(d, _signed(scale, 32))
    )  # fmt: skip


def _mxfp4(block):
    e, q = _cut(block, 1, 16)
    e = e.astype(jnp.uint32)  # 2^(e - 128): the two least are subnormal
    bits = jnp.where(e < 2, jnp.uint32(1 << 21) << e, (e - 1) << 23)
    return Groups(_nibbles(q), jax.lax.bitcast_convert_type(bits, jnp.float32))


# Bytes of a block, and its function.
TYPES: Mapping[str, tuple[int, Callable[[Array], Groups]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "IQ4_NL": (18, _iq4_nl),
    "IQ4_XS": (136, _iq4_xs),
    "MXFP4": (17, _mxfp4),
}
