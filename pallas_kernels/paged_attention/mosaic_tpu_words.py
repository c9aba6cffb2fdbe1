"""The packed cache: how heads of 128 lanes share 32-bit words, outside a kernel and inside one.

A vector register of a TPU is 8 sublanes by 128 lanes of 32-bit words, and a word holds p numbers
of p consecutive rows (bfloat16 2, 8-bit 4). A token's k and v are therefore rows of 128 lanes,
p to a word: the token axis lies outside the words, so one token can be read or written alone,
without touching its neighbours, and a page is one contiguous block of S * C * 512 bytes.

    head_dim <= 64    one row per head: k in lanes 0..63, v in lanes 64..127
    else              k's ceil(H / 128) rows, then v's, head after head

C words per token   p rows per word   X any leading axes   W words of 128 lanes
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
HALF = LANES // 2


class Packing(NamedTuple):
    """Of one token's k and v."""

    K: int  # kv heads
    H: int  # head_dim
    p: int  # rows per word

    @property
    def shared(self) -> bool:
        """k and v lie in the lanes of one row."""
        return self.H <= HALF

    @property
    def chunks(self) -> int:
        """Rows that a head_dim takes."""
        return -(-self.H // LANES)

    @property
    def rows(self) -> int:
        """Rows of one head's k and v."""
        return 1 if self.shared else 2 * self.chunks

    @property
    def C(self) -> int:
        return -(-self.K * self.rows // self.p)

    @property
    def together(self) -> int:
        """Heads that fill whole words, so that a loop over words may have a traced index."""
        return max(self.p // self.rows, 1)


def packing(num_kv_heads: int, head_dim: int, dtype) -> Packing:
    return Packing(num_kv_heads, head_dim, 4 // jnp.dtype(dtype).itemsize)


def _lanes(x_XH: jax.Array, size: int) -> jax.Array:
    pad = [(0, 0)] * (x_XH.ndim - 1) + [(0, size - x_XH.shape[-1])]
    return jnp.pad(x_XH, pad)


def _to_rows(x_XH: jax.Array, rows: int, p: int) -> jax.Array:
    """[..., n, lanes] as [..., ceil(rows / p), p, 128]."""
    x = x_XH.reshape(*x_XH.shape[:-2], rows, LANES)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -rows % p), (0, 0)])
    return x.reshape(*x.shape[:-2], -1, p, LANES)


def pack_kv(k_XKH: jax.Array, v_XKH: jax.Array, pack: Packing) -> jax.Array:
    """[..., C, p, 128]."""
    if pack.shared:
        kv = jnp.concatenate([_lanes(k_XKH, HALF), _lanes(v_XKH, HALF)], -1)
    else:
        size = pack.chunks * LANES
        kv = jnp.stack([_lanes(k_XKH, size), _lanes(v_XKH, size)], -2)
        kv = kv.reshape(*kv.shape[:-3], 2 * pack.K, size)
    return _to_rows(kv, pack.K * pack.rows, pack.p)


def pack_words(k_TKH: jax.Array, v_TKH: jax.Array, pack: Packing) -> jax.Array:
    """The words of pack_kv, [T, C, 1, 128]: arithmetic, which XLA fuses with what made k and v,
    where interleaving rows would be two copies."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[k_TKH.dtype.itemsize]
    if pack.shared:
        rows = jnp.concatenate([_lanes(k_TKH, HALF), _lanes(v_TKH, HALF)], -1)[:, :, None]
    else:
        size = pack.chunks * LANES
        halves = [_lanes(x, size).reshape(*x.shape[:2], -1, LANES) for x in (k_TKH, v_TKH)]
        rows = [half[:, :, c] for half in halves for c in range(pack.chunks)]
        if pack.rows >= pack.p:  # whole words of one head
            word = lambda i: _join_bits(rows[i : i + pack.p], bits)
            words = [word(i) for i in range(0, pack.rows, pack.p)]
            return jnp.stack(words, 2).reshape(k_TKH.shape[0], -1, 1, LANES)
        rows = jnp.stack(rows, 2)
    rows = rows.reshape(k_TKH.shape[0], -1, LANES)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % pack.p), (0, 0)))
    return _join_bits([rows[:, i :: pack.p] for i in range(pack.p)], bits)[:, :, None]


def _join_bits(rows: list[jax.Array], bits) -> jax.Array:
    words = [lax.bitcast_convert_type(x, bits).astype(jnp.uint32) for x in rows]
    shifts = range(0, 32, 32 // len(words))
    return functools.reduce(
        jnp.bitwise_or, (x << jnp.uint32(n) for x, n in zip(words, shifts, strict=True))
    )


def unpack_kv(kv_XCpH: jax.Array, pack: Packing) -> tuple[jax.Array, jax.Array]:
    """k and v, [..., K, H]."""
    x = kv_XCpH.reshape(*kv_XCpH.shape[:-3], -1, LANES)[..., : pack.K * pack.rows, :]
    x = x.reshape(*x.shape[:-2], pack.K, -1)
    k, v = jnp.split(x, 2, -1)
    return k[..., : pack.H], v[..., : pack.H]


def pack_q(q_TNH: jax.Array) -> jax.Array:
    """[T, words, p, 128]: heads side by side; lanes past head_dim are zero, so that they may meet
    any lanes of a packed k."""
    N, H = q_TNH.shape[1:]
    chunks = -(-H // LANES)
    return _to_rows(_lanes(q_TNH, chunks * LANES), N * chunks, 4 // q_TNH.dtype.itemsize)


def unpack_o(o_TWpH: jax.Array, N: int, pack: Packing) -> jax.Array:
    """[T, N, H] of what the kernel wrote in q's place: v's lanes."""
    x = o_TWpH.reshape(o_TWpH.shape[0], -1, LANES)[:, : N * pack.chunks]
    x = x.reshape(x.shape[0], N, -1)
    return x[..., HALF : HALF + pack.H] if pack.shared else x[..., : pack.H]


# The interpreter has neither bitcast nor reshape of a Ref: there a kernel sees arrays of words.


def as_words(x_XpH: jax.Array) -> jax.Array:
    """[..., p, 128] numbers as [..., 1, 128] words."""
    if x_XpH.shape[-2] == 1:
        return lax.bitcast_convert_type(x_XpH, jnp.uint32)
    x = jnp.moveaxis(x_XpH, -2, -1)
    return lax.bitcast_convert_type(x, jnp.uint32)[..., None, :]


def from_words(w_X1H: jax.Array, dtype) -> jax.Array:
    x = lax.bitcast_convert_type(w_X1H, dtype)
    return x if x.ndim == w_X1H.ndim else jnp.moveaxis(x[..., 0, :, :], -1, -2)


class WordRef(NamedTuple):
    """A buffer in VMEM, [slots, tokens, C, p, 128], read and written as words."""

    ref: Any
    interpret: bool

    def _flat(self):
        slots, tokens, C = self.ref.shape[:3]
        words = self.ref.bitcast(jnp.uint32)
        return words.reshape(slots, tokens * C, LANES)

    def row(self, slot, start, tokens: int, c) -> jax.Array:
        """Word c of `tokens` tokens, [tokens, 128]."""
        if self.interpret:
            return self.ref[slot, pl.ds(start, tokens), c, 0, :]
        C = self.ref.shape[2]
        return self._flat()[slot, pl.ds(start * C + c, tokens, stride=C), :]

    def set_row(self, slot, tokens: int, c, words_TH: jax.Array) -> None:
        if self.interpret:
            self.ref[slot, pl.ds(0, tokens), c, 0, :] = words_TH
        else:
            C = self.ref.shape[2]
            self._flat()[slot, pl.ds(c, tokens, stride=C), :] = words_TH

    def set_all(self, slot, words_CH: jax.Array) -> None:
        """Every word of the one token."""
        if self.interpret:
            self.ref[slot, 0, :, 0, :] = words_CH
        else:
            self._flat()[slot] = words_CH

    def all(self, slot, start, tokens: int) -> jax.Array:
        """Every word of `tokens` tokens, [tokens * C, 128]."""
        C = self.ref.shape[2]
        if self.interpret:
            return self.ref[slot, pl.ds(start, tokens), :, 0, :].reshape(tokens * C, LANES)
        return self._flat()[slot, pl.ds(start * C, tokens * C), :]


def part(words: jax.Array, i: int, dtype) -> jax.Array:
    """Row i of each word, float32."""
    if jnp.dtype(dtype).itemsize == 4:
        return lax.bitcast_convert_type(words, jnp.float32)
    high = (words << 16) if i == 0 else (words & jnp.uint32(0xFFFF0000))
    return lax.bitcast_convert_type(high, jnp.float32)


def join(parts: list[jax.Array], dtype) -> jax.Array:
    """Words whose rows are `parts`, float32, rounded to dtype."""
    bits = lambda x: lax.bitcast_convert_type(x.astype(dtype).astype(jnp.float32), jnp.uint32)
    if jnp.dtype(dtype).itemsize == 4:
        return bits(parts[0])
    low, high = parts
    return (bits(low) >> 16) | bits(high)
