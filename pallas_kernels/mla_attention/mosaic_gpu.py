"""Latent attention on Hopper.

Every query head reads the same cached tokens, so 64 rows of queries x heads do 121 operations for
each byte read, against the 206 that an H200 can do meanwhile: a decode step is limited by reading
the cache when its heads are at most 64, and by the tensor cores at 128 (two such tiles). The
kernel must keep both busy:

- Two warpgroups hold the 64 x C output, half of the columns each (all of it would take every
  register), and a third brings pages in by TMA, two at a time. A page is read once: it is the
  keys, and its first C columns are the values.
- The first computes the scores of the even pages and the second of the odd ones, and hands them
  to the other through SMEM. Their softmaxes follow one another, so that one warpgroup's runs
  during the other's products.
- Half pages have barriers of their own, and are loaded again as soon as they are used.
- Each block does an equal share of all pages of the step (mosaic_gpu_schedule.py); sequences that
  are cut are merged by a second, small kernel (mosaic_gpu_merge.py).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.devices import Device
from pallas_kernels.mla_attention import mosaic_gpu_kernel as kernel
from pallas_kernels.mla_attention import mosaic_gpu_schedule as schedule
from pallas_kernels.mla_attention import reference
from pallas_kernels.mla_attention.layout import Pages, tuning_key
from pallas_kernels.mla_attention.mosaic_gpu_kernel import PAGE, ROWS
from pallas_kernels.mla_attention.mosaic_gpu_merge import merge
from pallas_kernels.tuning import tuned

PARTIAL_BYTES = 2**28  # of results of units: what a candidate may take


class Tiles(NamedTuple):
    parts: int  # that the work is divided into; each is a block for every 64 heads
    unit_pages: int | None  # that a block visits of one sequence at a time; None: by the shapes


def tiles(heads: int, device: Device) -> Tiles:
    """One block for each multiprocessor: its SMEM holds one."""
    return Tiles(parts=max(device.cores // max(heads // ROWS, 1), 1), unit_pages=None)


def best_tiles(name: str, heads: int, device: Device) -> Tiles:
    """Those measured fastest for the key `name`, else one block for each multiprocessor."""
    return tuned("mla_attention", device, name, Tiles) or tiles(heads, device)


def candidates(T: int, N: int, C: int, M: int, decode_only: bool, device: Device) -> list[Tiles]:
    """Worth timing, the kernel's own choice first: other cuts of long rows, and two blocks one
    after the other for each multiprocessor, which evens out what differs between them."""
    heads = padded_heads(N)
    own = tiles(heads, device)
    queries, head_tiles = tile_of(heads, decode_only)
    items = schedule.num_items(T, 0, queries, decode_only)
    # Parts of results, float32, in device memory.
    room = lambda pages: items * -(-M // pages) * head_tiles * ROWS * C * 4
    cuts = [n for n in (8, 16, 24, 32, 48, 64, 128, 256) if n <= M and room(n) <= PARTIAL_BYTES]
    more = own._replace(parts=2 * own.parts)
    return [own, *(own._replace(unit_pages=n) for n in cuts), more]


def refuse(*, page_size: int, latent_dim: int, rope_dim: int, dtype) -> str | None:
    """Why not, or None."""
    if page_size != PAGE:
        return f"page_size is {page_size}; it must be {PAGE}"
    if latent_dim % 128 or not 128 <= latent_dim <= 512:
        return f"latent_dim is {latent_dim}; it must be 128, 256, 384 or 512"
    if rope_dim != ROWS:
        return f"rope_dim is {rope_dim}; it must be {ROWS}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype is {jnp.dtype(dtype).name}; it must be bfloat16 or float16"
    return None


def write_and_attend(
    q_TNC, q_TNH, latent_TC, rope_TH, pages, layer, page_T, slot_T, ragged, *,
    scale, decode_only, kv_scale, device: Device, chosen: Tiles | None, interpret,
):  # fmt: skip
    kv_LPSD = reference.write(latent_TC, rope_TH, pages.kv_LPSD, layer, page_T, slot_T, kv_scale)
    T, N, C = q_TNC.shape
    heads = padded_heads(N)
    room = ((0, 0), (0, heads - N), (0, 0))
    flat = lambda x: jnp.pad(x, room).reshape(T * heads, x.shape[2])
    name = tuning_key(q_TNC, q_TNH, kv_LPSD, ragged.pages_RM.shape[1], decode_only)
    chosen = chosen or best_tiles(name, heads, device)
    o_XC = attend(
        flat(q_TNC), flat(q_TNH), kv_LPSD, layer, ragged, heads=heads, scale=scale,
        decode_only=decode_only, tiles=chosen, interpret=interpret,
    )  # fmt: skip
    return o_XC.reshape(T, heads, C)[:, :N], Pages(kv_LPSD)


def padded_heads(N: int) -> int:
    """8, 16, 32 or a multiple of 64: tiles of 64 rows hold whole queries, or whole tiles one."""
    return next((n for n in (8, 16, 32) if n >= N), -(-N // ROWS) * ROWS)


def tile_of(heads: int, decode_only: bool) -> tuple[int, int]:
    """(queries of a tile, tiles of a query)."""
    return 1 if decode_only else max(ROWS // heads, 1), max(heads // ROWS, 1)


def attend(q_XC, q_XH, kv_LPSD, layer, ragged, *, heads, scale, decode_only, tiles, interpret):
    """X = T * heads rows of queries."""
    (X, C), D = q_XC.shape, kv_LPSD.shape[-1]
    # A decode tile has one query; its other rows, of few heads, are never written nor read.
    queries, head_tiles = tile_of(heads, decode_only)
    items = schedule.items(
        ragged, tokens=X // heads, queries=queries, page_size=PAGE, decode_only=decode_only
    )
    I, M = len(items.row_I), ragged.pages_RM.shape[1]
    pages = tiles.unit_pages or schedule.unit_pages(I, M, tiles.parts)
    most = -(-M // pages)  # units of an item
    units, merges, first_Z = schedule.units(items, pages=pages, most=most, parts=tiles.parts)
    slots = I * most if most > 1 else 1  # results of units, to be merged
    rows = queries * min(heads, ROWS)
    body = functools.partial(
        kernel.body, heads=heads, queries=queries, scale_log2=scale * math.log2(math.e)
    )
    attend_units = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((X, C), q_XC.dtype),
            jax.ShapeDtypeStruct((slots, head_tiles, rows, C), jnp.float32),
            jax.ShapeDtypeStruct((slots, head_tiles, ROWS), jnp.float32),
        ),
        # The head tiles of a part run side by side: the second finds the pages in L2.
        grid=(head_tiles, tiles.parts), grid_names=("head", "part"),
        num_threads=3, thread_name="wg",
        scratch_types={"s": kernel.scratch(C, D, q_XC.dtype, queries, interpret is not False)},
        # A row's maximum and sum stay within four lanes: they need no SMEM, and there is none.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret or None,
    )  # fmt: skip
    layer_1 = jnp.reshape(jnp.asarray(layer, jnp.int32), (1,))
    o_XC, o_part, lse_part = attend_units(
        q_XC, q_XH, kv_LPSD, layer_1, ragged.pages_RM, jnp.stack(units), first_Z
    )
    if most == 1:
        return o_XC
    return merge(
        o_XC, o_part, lse_part[:, :, :rows], jnp.stack(merges), heads=heads, interpret=interpret
    )
