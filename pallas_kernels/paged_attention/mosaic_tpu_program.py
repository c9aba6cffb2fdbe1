"""What mosaic_tpu.py's two programs are: tiles, sizes, scratch memory, and an item of work."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.mosaic_tpu_words import LANES, Packing

# Of positions, by powers of two: signed division costs the scalar unit ten instructions.
over = lambda x, n: lax.shift_right_logical(x, jnp.int32(n.bit_length() - 1))
up = lambda x, n: over(x + (n - 1), n)
within = lambda x, n: x & (n - 1)


class Tiles(NamedTuple):
    """All are powers of two."""

    queries: int  # of an item: 1 for decode
    tokens: int  # of a block: whole pages and whole chunks
    chunk: int  # tokens that are attended to at once, at least 128
    stages: int  # buffers of a block


class Program(NamedTuple):
    """What is static about one call."""

    tiles: Tiles
    N: int
    kv: Packing  # in the cache
    q: Packing  # in q's dtype: what the kernel computes with
    S: int
    M: int
    cores: int
    dtype: Any  # q's
    kv_dtype: Any
    scale: float
    attention_chunk_size: int | None
    softcap: float | None
    sinks: bool
    alibi: bool
    kv_scales: bool
    interpret: bool

    @property
    def decode(self) -> bool:
        return self.tiles.queries == 1

    @property
    def G(self) -> int:
        return self.N // self.kv.K

    @property
    def q_words(self) -> int:
        """Words of a token's queries."""
        return -(-self.N * self.q.chunks // self.q.p)

    @property
    def rows(self) -> int:
        """Query rows of a kv head: (g, t) of an item, decode's padded to a whole register."""
        return -(-self.G // 8) * 8 if self.decode else self.G * self.tiles.queries

    @property
    def staged(self) -> bool:
        """The cache's numbers are widened to q's dtype, chunk by chunk."""
        return self.kv_dtype != self.dtype

    @property
    def staged_words(self) -> int:
        return self.kv.C * self.kv.p // self.q.p

    @property
    def room(self) -> int:
        """Words of a token in VMEM: with an odd stride, one head's words of eight tokens lie in
        different banks and come with one load."""
        return self.kv.C if self.staged else self.kv.C | 1

    @property
    def prescaled(self) -> bool:
        """Scores are in units of log2; else the scale is applied inside the exponent."""
        return self.kv_scales or self.alibi or self.softcap is not None

    def scratch(self) -> dict[str, Any]:
        t, words = self.tiles, jnp.uint32
        heads = self.kv.K
        width = self.q.chunks * LANES
        # As in HBM, so that copies are plain; the interpreter sees words (mosaic_tpu_words.py).
        raw = lambda n, C, p, dtype: (
            pltpu.VMEM((t.stages, n, C, 1, LANES), words)
            if self.interpret
            else pltpu.VMEM((t.stages, n, C, p, LANES), dtype)
        )
        made = {
            "kv": raw(t.tokens, self.room, self.kv.p, self.kv_dtype),
            "q_in": raw(t.queries, self.q_words, self.q.p, self.dtype),
            "o_out": raw(t.queries, self.q_words, self.q.p, self.dtype),
            # float32 for decode: its rows start at any sublane
            "q": pltpu.VMEM((heads, self.rows, width), jnp.float32 if self.decode else self.dtype),
            "acc": pltpu.VMEM((heads, self.rows, width), jnp.float32),
            "peak": pltpu.VMEM((heads, self.rows, LANES), jnp.float32),  # the same in every lane
            "total": pltpu.VMEM((heads, self.rows, LANES), jnp.float32),  # a part in every lane
            "kv_sem": pltpu.SemaphoreType.DMA((t.stages,)),
            "q_sem": pltpu.SemaphoreType.DMA((t.stages,)),
            "o_sem": pltpu.SemaphoreType.DMA((t.stages,)),
            "write_sem": pltpu.SemaphoreType.DMA((t.stages,)),
        }
        if self.decode:
            made["flat"] = pltpu.VMEM((self.q_words * self.q.p, LANES), jnp.float32)
        if self.staged:
            made["stage"] = pltpu.VMEM((t.chunk * self.staged_words, LANES), words)
        for name, used in (("slope", self.alibi), ("sink", self.sinks)):
            if used:
                made[name] = pltpu.VMEM((heads, self.rows, LANES), jnp.float32)
        return made

    def vmem_bytes(self) -> int:
        """Of the scratch; the compiler's own values come on top."""
        vmem = (x for x in self.scratch().values() if x.memory_space == pltpu.VMEM)
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in vmem)


class Item(NamedTuple):
    """Some queries of a row; positions count the row's tokens from 0."""

    row: jax.Array
    token: jax.Array  # of the step, that is the item's first query
    new: jax.Array  # how many queries
    position: jax.Array  # of the first query
    old: jax.Array  # the row's tokens before this step
    page: jax.Array  # the first that some query sees
    blocks: jax.Array

    @property
    def end(self):
        return self.position + self.new
