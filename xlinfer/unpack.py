"""The bytes of quantized formats -> numbers and scales, on the device. Pure functions of arrays.

The formats' modules in converters/formats/ say how each lies on disk; a Code there is read here.

K inputs   N outputs   G groups of K/G inputs each   *E: a leading axis of experts, where there is
one
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from converters.formats import awq, gptq
from converters.formats.awq import AwqCode
from converters.formats.bitsandbytes import BLOCK, NESTED, Bits4Code, Bits8Code
from converters.formats.compressed_tensors import Fp4Code, PackedCode, PlainCode
from converters.formats.gguf_blocks import FORMS, GgufCode
from converters.formats.gptq import GptqCode
from converters.formats.packing import Code
from xlinfer import unpack_gguf
from xlinfer.forms import Grid


class Unpacked(NamedTuple):
    """A matrix: (numbers - zero) * scale, the outputs as the source has them."""

    numbers: Array  # [*E, N, K], of any dtype that holds them
    scale: Array  # float32: [*E, N, G] by group, [*E, N] by channel, [*E] for all
    in_blocks: bool = False  # then it is [*E, ceil(N/128), ceil(K/128)]
    zero_NG: Array | None = None
    order_K: Array | None = None
    input_scale: Array | None = None
    grid: Grid = "int"


def unpack(code: Code, parts: Mapping[str, Array]) -> Unpacked:
    match code:
        case GptqCode():
            return _gptq(code, parts)
        case AwqCode():
            return _awq(code, parts)
        case PackedCode():
            return _packed(code, parts)
        case PlainCode():
            return _plain(code, parts)
        case Fp4Code():
            return _fp4(code, parts)
        case GgufCode():
            return _gguf(code, parts)
        case Bits4Code():
            return _bits4(code, parts)
        case Bits8Code():
            return Unpacked(parts["weight"], parts["SCB"] / 127)
    raise TypeError(f"{code!r} is no code of a format that is read")


def _gptq(code: GptqCode, parts) -> Unpacked:
    bits, half = code.bits, 1 << (code.bits - 1)
    words_NW = _unsigned(parts["qweight"].T)
    scale_NG, order_K = parts["scales"].T.astype(jnp.float32), parts.get("order")
    q_NK = _in_order(_stream(words_NW, bits, words_NW.shape[1] * 32 // bits), order_K)
    if code.zeros == "symmetric":
        return Unpacked(q_NK - half, scale_NG, order_K=order_K)
    words_GW = _unsigned(parts["qzeros"])
    if code.zeros == "v1":
        less = np.resize(np.array(gptq.LESS[bits], np.uint32), words_GW.shape[1])
        words_GW += jnp.asarray(less)[None]
    zero_NG = _stream(words_GW, bits, words_GW.shape[1] * 32 // bits).T
    if code.zeros == "v1, each":
        zero_NG = (zero_NG + 1) % (1 << bits)
    shift = half if bits == 8 else 0  # int8 holds them less 128
    zero_NG = (zero_NG - shift).astype(jnp.float32)
    return Unpacked(q_NK - shift, scale_NG, zero_NG=zero_NG, order_K=order_K)


def _awq(code: AwqCode, parts) -> Unpacked:
    nibbles = lambda words: _stream(_unsigned(words), 4, words.shape[-1] * 8)
    if code.version == "gemv":
        zero_NG = nibbles(parts["qzeros"])[:, : code.groups].astype(jnp.float32)
        scale_NG = parts["scales"][:, : code.groups].astype(jnp.float32)
        return Unpacked(nibbles(parts["qweight"]), scale_NG, zero_NG=zero_NG)
    place = jnp.argsort(jnp.asarray(awq.ORDER))  # of output i in its word
    ordered = lambda words: nibbles(words).reshape(words.shape[0], -1, 8)[..., place]
    q_NK, zero_NG = (
        ordered(parts[name]).reshape(parts[name].shape[0], -1).T for name in ("qweight", "qzeros")
    )
    scale_NG = parts["scales"].T.astype(jnp.float32)
    return Unpacked(q_NK, scale_NG, zero_NG=zero_NG.astype(jnp.float32))


def _packed(code: PackedCode, parts) -> Unpacked:
    (N, K), bits = code.shape, code.bits
    half = 1 << (bits - 1)
    scale_NG, order_K = parts["scale"].astype(jnp.float32), parts.get("order")
    words_NW = _unsigned(parts["packed"])
    numbers = _stream if words_NW.shape[1] == -(-K * bits // 32) else _word_by_word
    q_NK = _in_order(numbers(words_NW, bits, K), order_K)
    if code.symmetric:
        return Unpacked(q_NK - half, scale_NG, order_K=order_K)
    zero_GN = numbers(_unsigned(parts["zero"].T), bits, N)
    shift = half if bits > 4 else 0  # int8 holds them less half of the range
    zero_NG = (zero_GN.T - shift).astype(jnp.float32)
    return Unpacked(q_NK - shift, scale_NG, zero_NG=zero_NG, order_K=order_K)


def _plain(code: PlainCode, parts) -> Unpacked:
    scale, static = _scale(parts["scale"]), parts.get("input_scale")
    if code.scales in ("tensor", "channel"):
        scale = scale.reshape(() if code.scales == "tensor" else (-1,))
    static = None if static is None else static.astype(jnp.float32).reshape(())
    in_blocks = code.scales == "block"
    return Unpacked(parts["weight"], scale, in_blocks=in_blocks, input_scale=static)


def _fp4(code: Fp4Code, parts) -> Unpacked:
    """e2m1 as its sign and the place of its magnitude."""
    scale = parts["scale"].astype(jnp.float32) if code.scale == "e4m3" else _scale(parts["scale"])
    match code.global_scale:
        case "divides":
            scale = scale / parts["global_scale"].reshape(())
        case "multiplies":
            scale = scale * parts["global_scale"].reshape(())
    bytes_ = parts["packed"].reshape(*scale.shape[:-1], -1).astype(jnp.int32)
    codes = jnp.stack([bytes_ & 15, bytes_ >> 4], -1).reshape(*bytes_.shape[:-1], -1)
    # The form counts in half steps.
    return Unpacked(_sign_and_place(codes), scale / 2, grid="e2m1")


def _gguf(code: GgufCode, parts) -> Unpacked:
    found, form = unpack_gguf.unpack(parts["weight"], code.blocks), FORMS[code.blocks]
    numbers = found.data
    if form.grid == "e2m1":
        numbers = _sign_and_place(numbers.astype(jnp.int32))
    return Unpacked(numbers, found.scale, zero_NG=found.zero, grid=form.grid)


def _sign_and_place(codes: Array) -> Array:
    """Of 4-bit codes whose first bit is the sign."""
    return jnp.where(codes & 8, -(codes & 7), codes & 7)


def _bits4(code: Bits4Code, parts) -> Unpacked:
    (N, K), absmax_B = code.shape, parts["absmax"]
    if code.nested:
        of_B = parts["nested_absmax"][jnp.arange(absmax_B.size) // NESTED]
        absmax_B = parts["nested_map"][absmax_B.astype(jnp.int32)] * of_B + parts["offset"]
    bytes_ = parts["weight"].astype(jnp.int32)
    numbers = jnp.stack([bytes_ >> 4, bytes_ & 15], -1).reshape(-1)[: N * K].reshape(N, K)
    if K % BLOCK:  # blocks reach over the ends of rows: a scale for each number
        absmax_B = jnp.repeat(absmax_B, BLOCK)[: N * K]
    return Unpacked(numbers, absmax_B.astype(jnp.float32).reshape(N, -1), grid=code.grid)


def _in_order(q_NK: Array, order_K: Array | None) -> Array:
    """Inputs of one group next to each other."""
    return q_NK if order_K is None else q_NK[:, order_K]


def _scale(scale: Array) -> Float[Array, "..."]:
    """Of floats, or of bytes that are powers of two (E8M0)."""
    if scale.dtype == jnp.uint8:  # the exponents of floats, as XLA's exp2 is not exact
        bits = jnp.maximum(scale.astype(jnp.uint32) << 23, 1 << 22)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return scale.astype(jnp.float32)


def _unsigned(words: Int[Array, "..."]) -> UInt32[Array, "..."]:
    return jax.lax.bitcast_convert_type(words, jnp.uint32)


def _word_by_word(words: UInt32[Array, "R W"], bits: int, count: int) -> Int[Array, "R C"]:
    """The first `count` numbers of each row, of which each word has as many as fit."""
    shifts = jnp.arange(32 // bits, dtype=jnp.uint32) * bits
    numbers = (words[..., None] >> shifts[None, None]) & ((1 << bits) - 1)
    return numbers.reshape(words.shape[0], -1)[:, :count].astype(jnp.int32)


def _stream(words: UInt32[Array, "R W"], bits: int, count: int) -> Int[Array, "R C"]:
    """The first `count` numbers of each row's stream of bits, low bits first."""
    if 32 % bits == 0:
        shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)[None, None]
        numbers = (words[..., None] >> shifts) & ((1 << bits) - 1)
        return numbers.astype(jnp.int32).reshape(words.shape[0], -1)[:, :count]
    at = jnp.arange(count) * bits
    low, shift = words[:, at // 32], (at % 32).astype(jnp.uint32)[None]
    # A number may begin in one word and end in the next.
    high = words[:, jnp.minimum(at // 32 + 1, words.shape[1] - 1)]
    left = jnp.minimum(32 - shift, 31)
    numbers = (low >> shift) | jnp.where(shift + bits > 32, high << left, 0)
    return (numbers & ((1 << bits) - 1)).astype(jnp.int32)
