"""What mosaic_tpu.py's programs compute: the heads of one item, against chunks of its row."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.mosaic_tpu_program import Item, Program, up
from pallas_kernels.paged_attention.mosaic_tpu_words import LANES, join, part
from pallas_kernels.reach import into_chunk, oldest

MASKED = -1e30  # finite: exp2(MASKED - MASKED) must not be nan
LOG2E = 1.4426950408889634


class Heads(NamedTuple):
    """What is computed on the heads of one item."""

    pg: Program
    ref: dict[str, Any]
    words: Any  # the name of a buffer -> WordRef

    def start(self) -> None:
        pg, ref = self.pg, self.ref
        if pg.decode:  # rows past G are computed with
            ref["q"][...] = jnp.zeros_like(ref["q"])
        if pg.decode and pg.q_words * pg.q.p > pg.N * pg.q.chunks:
            ref["flat"][...] = jnp.zeros_like(ref["flat"])
        if pg.alibi:
            self._per_head("slope", ref["alibi"], LOG2E)
        if pg.sinks:
            self._per_head("sink", ref["sinks"], LOG2E if pg.prescaled else 1 / pg.scale)

    def _per_head(self, name: str, values_N, unit: float) -> None:
        pg, out = self.pg, self.ref[name]
        out[...] = jnp.zeros_like(out)
        for n in range(pg.N):
            value = jnp.full((pg.tiles.queries, LANES), values_N[n] * unit, jnp.float32)
            out[n // pg.G, pl.ds(n % pg.G * pg.tiles.queries, pg.tiles.queries), :] = value

    def reset(self) -> None:
        pg, ref = self.pg, self.ref
        ref["acc"][...] = jnp.zeros_like(ref["acc"])
        if pg.sinks:  # one more score, seen first, whose value is zero
            ref["peak"][...] = ref["sink"][...]
            ref["total"][...] = jnp.full_like(ref["total"], 1 / LANES)
        else:
            ref["peak"][...] = jnp.full_like(ref["peak"], MASKED)
            ref["total"][...] = jnp.zeros_like(ref["total"])

    def load_queries(self, slot) -> None:
        """Sort an item's queries by kv head: rows (g, t)."""
        pg, ref, q_in = self.pg, self.ref, self.words("q_in")
        if pg.decode:
            words = q_in.all(slot, 0, 1)
            for i in range(pg.q.p):
                ref["flat"][pl.ds(i, pg.q_words, stride=pg.q.p), :] = part(words, i, pg.dtype)
            for h, lanes, rows in self._decode_rows():
                ref["q"][h, pl.ds(0, pg.G), lanes] = ref["flat"][rows, :]
            return

        @pl.loop(0, pg.q_words)
        def _(w):
            words = q_in.row(slot, 0, pg.tiles.queries, w)
            for i in range(pg.q.p):
                n, h, rows, lanes = self._prefill_rows(w, i)

                @pl.when(n < pg.N)
                def _(i=i, h=h, rows=rows, lanes=lanes):
                    ref["q"][h, rows, lanes] = part(words, i, pg.dtype).astype(pg.dtype)

    def store_outputs(self, slot) -> None:
        pg, ref, o_out = self.pg, self.ref, self.words("o_out")

        def divide(h) -> None:
            total = jnp.sum(ref["total"][h], axis=1, keepdims=True)
            total = jnp.where(total == 0, 1.0, total)
            if pg.kv_scales:
                total = total / ref["v_scale"][h]
            ref["acc"][h] = ref["acc"][h] * jnp.broadcast_to(1 / total, ref["acc"].shape[1:])

        self._each(pg.kv.K, divide)
        if pg.decode:
            for h, lanes, rows in self._decode_rows():
                ref["flat"][rows, :] = ref["acc"][h, pl.ds(0, pg.G), lanes]
            every = [ref["flat"][pl.ds(i, pg.q_words, stride=pg.q.p), :] for i in range(pg.q.p)]
            o_out.set_all(slot, join(every, pg.dtype))
            return

        @pl.loop(0, pg.q_words)
        def _(w):
            parts = []
            for i in range(pg.q.p):
                _, h, rows, lanes = self._prefill_rows(w, i)
                # Past the last head the last one's output fills the word.
                parts.append(ref["acc"][jnp.minimum(h, pg.kv.K - 1), rows, lanes])
            o_out.set_row(slot, pg.tiles.queries, w, join(parts, pg.dtype))

    def _each(self, count: int, f) -> None:
        if self.pg.decode:  # straight-line code lets one head's products overlap another's softmax
            for i in range(count):
                f(i)
        else:
            pl.loop(0, count)(f)

    def _decode_rows(self):
        """(kv head, lanes, which of a token's rows) of every 128 lanes of the heads."""
        pg = self.pg
        for h in range(pg.kv.K):
            for c in range(pg.q.chunks):
                first = h * pg.G * pg.q.chunks + c
                yield h, pl.ds(c * LANES, LANES), pl.ds(first, pg.G, stride=pg.q.chunks)

    def _prefill_rows(self, w, i: int):
        """(query head, kv head, rows, lanes) of row i of a token's word w."""
        pg, size = self.pg, self.pg.tiles.queries
        if pg.q.p % pg.q.chunks == 0:
            n, c = w * (pg.q.p // pg.q.chunks) + i // pg.q.chunks, jnp.int32(i % pg.q.chunks)
        else:
            n, c = w // pg.q.chunks, lax.rem(w, pg.q.chunks)
        lanes = pl.ds(pl.multiple_of(c * LANES, LANES), LANES)
        return n, n // pg.G, pl.ds(pl.multiple_of(lax.rem(n, pg.G) * size, size), size), lanes

    def attend(self, it: Item, slot, first, end, window) -> None:
        """Attend to positions first .. end, which lie in buffer `slot`."""
        size = self.pg.tiles.chunk

        @pl.loop(0, up(jnp.where(it.new > 0, end - first, 0), size))
        def _(c):
            at = first + c * size
            if self.pg.staged:
                self._widen(slot, c * size)
            # Masks cost as much as the exponent does: only where some query needs them.
            first_key = oldest(it.end - 1, window, self.pg.attention_chunk_size)
            edge = (at + size - 1 > it.position) | (at < first_key)
            for masked in (False, True):

                @pl.when(edge == masked)
                def _(masked=masked):
                    self._chunk(it, slot, c * size, at, end, window, masked)

    def _chunk(self, it: Item, slot, start, at, end, window, masked: bool) -> None:
        pg, ref = self.pg, self.ref
        size, p = pg.tiles.chunk, pg.q.p
        group_words = pg.q.together * pg.q.rows // p
        # Masks; what is not used of them is not compiled.
        here = lax.broadcasted_iota(jnp.int32, (size, LANES), 0) < end - at
        shape = (pg.rows, size)
        t = lax.broadcasted_iota(jnp.int32, shape, 0) & (pg.tiles.queries - 1)
        behind = it.position - at + t - lax.broadcasted_iota(jnp.int32, shape, 1)
        seen = (behind >= 0) & (behind < window) if masked else None
        if masked and pg.attention_chunk_size is not None:
            seen &= behind <= into_chunk(it.position + t, pg.attention_chunk_size)

        def load(c):
            if pg.staged:
                words = ref["stage"][pl.ds(c, size, stride=pg.staged_words), :]
            else:
                words = self.words("kv").row(slot, start, size, c)
            # Past the row's end lies anything, and 0 * nan is nan.
            return jnp.where(here, words, jnp.uint32(0)) if masked else words

        def group(i, heads: int = pg.q.together) -> None:
            words = [load(i * group_words + j) for j in range(group_words)]
            for u in range(heads):
                places = range(u * pg.q.rows, (u + 1) * pg.q.rows)
                rows = [part(words[j // p], j % p, pg.dtype).astype(pg.dtype) for j in places]
                k, v = rows[: pg.q.chunks], rows[-pg.q.chunks :]  # the same one if shared
                self._head(i * pg.q.together + u, k, v, behind, seen)

        groups, odd = divmod(pg.kv.K, pg.q.together)
        self._each(groups, group)
        if odd:
            group(groups, odd)

    def _widen(self, slot, start) -> None:
        """A chunk of the 8-bit cache as words of q's dtype. In pieces: a conversion is long code
        where the chip has none, v5e to v6e."""
        pg, piece = self.pg, 64

        @pl.loop(0, pg.tiles.chunk // piece)
        def _(i):
            words = self.words("kv").all(slot, start + i * piece, piece)
            wide = pltpu.bitcast(words, pg.kv_dtype).astype(pg.dtype)
            size = piece * pg.staged_words
            self.ref["stage"][pl.ds(i * size, size), :] = pltpu.bitcast(wide, jnp.uint32)

    def _head(self, h, k_cnH, v_cnH, behind, seen) -> None:
        """Online softmax of one kv head over a chunk; k and v are lists of 128 lanes each."""
        pg, ref = self.pg, self.ref
        size = pg.tiles.chunk
        exact = lax.Precision.HIGHEST if pg.dtype == jnp.float32 else None
        dot = lambda x, y, axis: lax.dot_general(
            x, y, (((1,), (axis,)), ((), ())), precision=exact,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        lanes = [pl.ds(c * LANES, LANES) for c in range(pg.q.chunks)]
        widen = lambda x: jnp.concatenate([x] * (size // LANES), axis=1) if size > LANES else x

        q_cnH = (ref["q"][h, :, at].astype(pg.dtype) for at in lanes)
        s = sum(dot(q, k, 1) for q, k in zip(q_cnH, k_cnH, strict=True))
        unit = pg.scale * LOG2E
        if pg.prescaled:
            score = pg.scale * ref["k_scale"][h] if pg.kv_scales else pg.scale
            if pg.softcap is not None:
                s = jnp.tanh(s * (score / pg.softcap)) * (pg.softcap * LOG2E)
            else:
                s = s * (score * LOG2E)
            if pg.alibi:
                s = s - widen(ref["slope"][h]) * behind.astype(jnp.float32)
            unit = 1.0
        if seen is not None:
            s = jnp.where(seen, s, MASKED)
        old = ref["peak"][h]
        new = jnp.maximum(old, jnp.broadcast_to(jnp.max(s, axis=1, keepdims=True), old.shape))
        power = lambda x: jnp.exp2(x if unit == 1.0 else x * unit)
        shrink = power(old - new)
        p = power(s - widen(new))
        total = ref["total"][h] * shrink
        for c in range(size // LANES):
            total = total + p[:, c * LANES : (c + 1) * LANES]
        ref["peak"][h] = new
        ref["total"][h] = total
        p = p.astype(pg.dtype)
        for at, v in zip(lanes, v_cnH, strict=True):
            ref["acc"][h, :, at] = ref["acc"][h, :, at] * shrink + dot(p, v, 0)
