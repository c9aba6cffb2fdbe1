"""How cached blocks reach the matrix unit: what the decode and the prefill kernel share.

A block is a stretch of consecutive keys of one row and one kv head: one or several pages, each a
contiguous [S, H] piece of the pool that one TMA copy brings into its rows of a shared tile. Pages
of an 8-bit cache are read as such; the fetching warpgroup turns them into float16 in SMEM: e4m3
fits float16 exactly, the chip converts it natively (to bfloat16 it does not), and wgmma cannot
take an e4m3 operand transposed, as the values must be.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import ACC, swizzled
from pallas_kernels.paged_attention.layout import FP8

LOG2E = math.log2(math.e)
MASKED = -1e30  # the score of what a query does not see
# Where a maximum starts: under every score and far over MASKED, so that a block of which a query
# sees nothing adds zeros. From MASKED, the rounding of MASKED * scale would be exponentiated.
LOWEST = -1e20
ROWS = 8  # of one swizzled tile
INT = jnp.int32


def compute_dtype(kv_dtype: Any) -> Any:
    """Of the products: a cache's own dtype, float16 for an 8-bit one."""
    return jnp.dtype(jnp.float16) if kv_dtype == FP8 else jnp.dtype(kv_dtype)


class Ring(NamedTuple):
    """The SMEM that blocks travel through. `stages` blocks wait for the matrix unit; of an 8-bit
    cache, `raw_stages` more are on their way from the pool."""

    block: int  # keys
    page: int  # tokens of a page, at most `block`
    head_dim: int
    value_columns: int  # head_dim, or more where the values' tile must be wider
    kv_dtype: Any
    stages: int
    raw_stages: int  # 0 unless 8-bit
    consumers: int  # warpgroups that read each block

    @property
    def raw(self) -> bool:
        return self.kv_dtype == FP8

    @property
    def bytes(self) -> int:
        one = self.block * jnp.dtype(compute_dtype(self.kv_dtype)).itemsize
        raw = 2 * self.raw_stages * self.block * self.head_dim
        return raw + self.stages * one * (self.head_dim + self.value_columns)

    def scratch(self) -> dict:
        """SMEM and barriers, by the names that the functions below use."""
        dtype = compute_dtype(self.kv_dtype)
        transforms = swizzled(dtype, self.head_dim)
        tile = lambda columns: plgpu.SMEM(
            (self.stages, self.block, columns), dtype, transforms=transforms
        )
        arrivals = self.block // self.page
        free = plgpu.Barrier(num_arrivals=self.consumers, num_barriers=self.stages)
        refs = {"k": tile(self.head_dim), "v": tile(self.value_columns)}
        if self.raw:
            one = plgpu.SMEM((self.raw_stages, self.block, self.head_dim), self.kv_dtype)
            full = plgpu.Barrier(num_barriers=self.stages)
            come = plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.raw_stages)
            refs |= {"raw_k": one, "raw_v": one, "come_k": come, "come_v": come}
            return refs | {"full_k": full, "full_v": full, "free_k": free, "free_v": free}
        full = lambda n: plgpu.Barrier(num_arrivals=n, num_barriers=self.stages)
        pieces = arrivals * (self.page // ROWS if self.padded else 1)
        return refs | {
            "full_k": full(arrivals), "full_v": full(pieces), "free_k": free, "free_v": free,
        }  # fmt: skip

    @property
    def padded(self) -> bool:
        return self.value_columns != self.head_dim


def copy_block(ring: Ring, cache, layer, pages: list, head, tile, barrier, padded: bool) -> None:
    """Start the copies of a block's pages into `tile`, [block, head_dim] unless `padded`."""
    for j, page in enumerate(pages):
        first = j * ring.page
        if not padded:
            piece = tile.at[pl.ds(first, ring.page)]
            plgpu.copy_gmem_to_smem(cache.at[layer, page, head], piece, barrier)
            continue
        # A copy's destination must be contiguous: of a wider tile that is one row of tiles.
        for row in range(0, ring.page, ROWS):
            piece = tile.at[pl.ds(first + row, ROWS), pl.ds(0, ring.head_dim)]
            rows = cache.at[layer, page, head, pl.ds(row, ROWS)]
            plgpu.copy_gmem_to_smem(rows, piece, barrier)


def fetch(ring: Ring, refs: dict, k_g, v_g, n, layer, pages: list, head) -> None:
    """Start bringing in a worker's n-th block, once its stage is free."""
    if ring.raw:
        slot = lax.rem(n, INT(ring.raw_stages))
        for name, cache in (("k", k_g), ("v", v_g)):
            tile, come = refs["raw_" + name].at[slot], refs["come_" + name].at[slot]
            copy_block(ring, cache, layer, pages, head, tile, come, False)

        @pl.when(n >= ring.raw_stages - 1)
        def _():
            convert(ring, refs, n - (ring.raw_stages - 1))

        return
    slot = lax.rem(n, INT(ring.stages))
    for name, cache in (("k", k_g), ("v", v_g)):

        @pl.when(n >= ring.stages)
        def _(name=name):
            plgpu.barrier_wait(refs["free_" + name].at[slot])

        tile, full = refs[name].at[slot], refs["full_" + name].at[slot]
        copy_block(ring, cache, layer, pages, head, tile, full, name == "v" and ring.padded)


def convert(ring: Ring, refs: dict, n) -> None:
    """The n-th 8-bit block, as float16 in its stage."""
    raw_slot, slot = lax.rem(n, INT(ring.raw_stages)), lax.rem(n, INT(ring.stages))
    for name in ("k", "v"):
        plgpu.barrier_wait(refs["come_" + name].at[raw_slot])

        @pl.when(n >= ring.stages)
        def _(name=name):
            plgpu.barrier_wait(refs["free_" + name].at[slot])

        for row in range(0, ring.block, 64):  # a few registers at a time
            rows = pl.ds(row, 64)
            raw = refs["raw_" + name].at[raw_slot, rows]
            x = plgpu.load(raw, layout=plgpu.Layout.WGMMA_UPCAST_2X)
            x = plgpu.layout_cast(x.astype(jnp.float16), plgpu.Layout.WGMMA)
            refs[name].at[slot, rows, pl.ds(0, ring.head_dim)][...] = x
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs["full_" + name].at[slot])


def finish(ring: Ring, refs: dict, count) -> None:
    """After the last `fetch`, of `count`: convert what is left, and see every stage freed."""
    if ring.raw:

        @pl.loop(jnp.maximum(count - (ring.raw_stages - 1), 0), count)
        def _(n):
            convert(ring, refs, n)

    @pl.loop(jnp.maximum(count - ring.stages, 0), count)
    def _(n):
        for name in ("free_k", "free_v"):
            plgpu.barrier_wait(refs[name].at[lax.rem(n, INT(ring.stages))])


def block_pages(ring: Ring, pages_g, row, block, length) -> list:
    """The pages of a row's block. Those past its end are the last one again: what they bring is
    masked, but it must be finite and its page one of the row's own."""
    per_block = ring.block // ring.page
    last = lax.div(length - 1, INT(ring.page))
    return [pages_g[row, jnp.minimum(block * per_block + j, last)] for j in range(per_block)]


def capped(s, softcap: float | None):
    """Scores times log2(e), softcap * tanh(score / softcap) where there is one. tanh comes from
    exp2, which is good to 2 in 2^24; the chip's own tanh has errors of 5e-4."""
    if softcap is None:
        return s
    top = softcap * LOG2E
    return top - 2.0 * top / (jnp.exp2(s * (2.0 * LOG2E / top)) + 1.0)


def product(a, b, shape: tuple[int, int]):
    """a @ b, both in SMEM, float32 in registers."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, ACC(shape, jnp.float32))


def filled(shape: tuple[int, ...], value: float, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
