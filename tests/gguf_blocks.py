"""Blocks of GGUF packed from their numbers, one number at a time, as ggml's C structs define them:
no part of it is how xlinfer reads them."""

import numpy as np


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


def nibbles(q: np.ndarray) -> bytes:
    """Two numbers of 4 bits in a byte: j and j + 16 of each 32."""
    return bytes(int(q[32 * i + j]) | int(q[32 * i + j + 16]) << 4
                 for i in range(len(q) // 32) for j in range(16))  # fmt: skip


def fifths(q: np.ndarray) -> bytes:
    """The fifth bit of 32 numbers, as one little-endian word."""
    return sum(int(q[j]) >> 4 << j for j in range(32)).to_bytes(4, "little")


def k_scales(scale: np.ndarray, minimum: np.ndarray) -> bytes:
    """8 scales and 8 minima of 6 bits."""
    out = bytearray(12)
    for j in range(4):
        out[j], out[j + 4] = int(scale[j]), int(minimum[j])
    for j in range(4, 8):
        s, m = int(scale[j]), int(minimum[j])
        out[j + 4] = s & 15 | (m & 15) << 4
        out[j - 4] |= s >> 4 << 6
        out[j] |= m >> 4 << 6
    return bytes(out)


def quarters(q: np.ndarray) -> bytes:
    """Four numbers of 2 bits in a byte: l, l + 32, l + 64 and l + 96 of each 128."""
    return bytes(
        sum((int(q[half + l + 32 * i]) & 3) << 2 * i for i in range(4))
        for half in (0, 128)
        for l in range(32)
    )


def q4_0(d, q):
    return half(d) + nibbles(q + 8)


def q4_1(d, m, q):
    return half(d) + half(m) + nibbles(q)


def q5_0(d, q):
    q = q + 16
    return half(d) + fifths(q) + nibbles(q & 15)


def q5_1(d, m, q):
    return half(d) + half(m) + fifths(q) + nibbles(q & 15)


def q8_0(d, q):
    return half(d) + q.astype(np.int8).tobytes()


def q2_k(d, dmin, scale, minimum, q):
    scales = bytes(int(s) | int(m) << 4 for s, m in zip(scale, minimum, strict=True))
    return scales + quarters(q) + half(d) + half(dmin)


def q3_k(d, scale, q):
    """Scales -32..31 and numbers -4..3; a bit of the mask says that nothing is subtracted."""
    mask, scales = bytearray(32), bytearray(12)
    for j in range(256):
        mask[j % 32] |= int(q[j] >= 0) << j // 32
    for j in range(16):
        s = int(scale[j]) + 32
        scales[j % 8] |= (s & 15) << (0 if j < 8 else 4)
        scales[8 + j % 4] |= s >> 4 << 2 * (j // 4)
    return bytes(mask) + quarters(q & 3) + bytes(scales) + half(d)


def q4_k(d, dmin, scale, minimum, q):
    data = bytes(
        int(q[64 * i + l]) | int(q[64 * i + l + 32]) << 4 for i in range(4) for l in range(32)
    )
    return half(d) + half(dmin) + k_scales(scale, minimum) + data


def q5_k(d, dmin, scale, minimum, q):
    high = bytes(sum((int(q[32 * i + l]) >> 4) << i for i in range(8)) for l in range(32))
    packed = q4_k(d, dmin, scale, minimum, q & 15)
    return packed[:16] + high + packed[16:]


def q6_k(d, scale, q):
    """Scales of 8 bits, numbers -32..31."""
    low, high = bytearray(128), bytearray(64)
    for i in range(2):
        for l in range(32):
            four = [int(q[128 * i + l + 32 * part]) + 32 for part in range(4)]
            low[64 * i + l] = four[0] & 15 | (four[2] & 15) << 4
            low[64 * i + l + 32] = four[1] & 15 | (four[3] & 15) << 4
            high[32 * i + l] = sum(four[part] >> 4 << 2 * part for part in range(4))
    return bytes(low) + bytes(high) + scale.astype(np.int8).tobytes() + half(d)


def iq4_nl(d, code):
    return half(d) + nibbles(code)


def iq4_xs(d, scale, code):
    """Scales -32..31: 4 bits of each in a nibble, the other two in a word of all."""
    high, low = 0, bytearray(4)
    for i in range(8):
        s = int(scale[i]) + 32
        low[i // 2] |= (s & 15) << 4 * (i % 2)
        high |= s >> 4 << 2 * i
    return half(d) + high.to_bytes(2, "little") + bytes(low) + nibbles(code)


def mxfp4(e, code):
    return bytes([e]) + nibbles(code)
