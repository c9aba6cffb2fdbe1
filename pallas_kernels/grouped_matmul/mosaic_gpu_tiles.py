"""How the grouped product on Hopper is cut into tiles."""

from typing import NamedTuple

import jax

from pallas_kernels.devices import Device
from pallas_kernels.grouped_matmul.weights import Form, tuning_key
from pallas_kernels.tuning import tuned

OUT = 64  # output features of a piece of y on its way out: a swizzle of 128 bytes
ALIGN = 8  # rows of a swizzle: where a row tile may start
# SMEM for barriers alone, and with scales that hold for all of K; with their alignment.
SMALL_BYTES = 1024, 4096


class Tiles(NamedTuple):
    rows: int  # of x in a tile: a power of two, 8 to 256
    cols: int  # output features of a compute warpgroup: 64, or 128 for float weights
    warpgroups: int  # that compute: 1 to 4; cols * warpgroups is at most 256
    depth: int  # input features of a step
    stages: int  # steps in flight
    side: int  # row tiles that visit the blocks of output features together
    ctas: int = 0  # 0: as many as the device has cores


def choose_tiles(x_MK, w_ENK, E: int, scale, zero, form: Form, device: Device) -> Tiles:
    """What seems best for x's rows spread evenly over the experts; not measured."""
    M, N = x_MK.shape[0], w_ENK.shape[1]
    # Few rows that start anywhere within 8 reach into a second eight.
    # Where more rows would spill registers.
    narrow = 16 if form.kind == "int4" else 32
    most = 64 if form.in_groups and form.group <= narrow else 128
    rows = min(max(16, 1 << (-(-M // E) + 6).bit_length()), most)
    many = rows >= 64
    cols = 128 if form.kind == "float" and many and N >= 256 else 64
    warpgroups = 2 if N >= 2 * cols else 1
    if (form.kind == "int8" or form.in_groups) and not many and N >= 4 * cols:
        warpgroups = 4  # one widens while others multiply
    if form.in_groups and form.group < 128 and many:
        depth = 64  # fewer registers of weights
    else:
        depth = 64 if form.kind == "float" and many else 128
    tiles = Tiles(rows, cols, warpgroups, depth, 1, 8)
    free = device.scratch_bytes - warpgroups * rows * OUT * x_MK.dtype.itemsize
    free -= SMALL_BYTES[form.kind != "float" and not form.in_groups]
    return tiles._replace(stages=min(free // _stage_bytes(form, tiles, w_ENK, scale, zero), 8))


def best_tiles(x_MK, w_ENK, E: int, scale, zero, form: Form, device: Device) -> Tiles:
    """Those measured fastest, else what seems so."""
    measured = tuned("grouped_matmul", device, tuning_key(x_MK, w_ENK, E, scale, form), Tiles)
    return measured or choose_tiles(x_MK, w_ENK, E, scale, zero, form, device)


def _stage_bytes(form: Form, tiles: Tiles, w_ENK, scale, zero) -> int:
    """SMEM of one stage."""
    width = tiles.cols * tiles.warpgroups
    per_k = width * jax.dtypes.itemsize_bits(w_ENK.dtype) // 8
    total = tiles.depth * (per_k + tiles.rows * (1 if form.is_fp8 else 2))
    if form.in_groups:
        vectors = sum(s.dtype.itemsize for s in (scale, zero) if s is not None)
        total += groups_of_step(form, tiles) * width * vectors
    return total + (4 * tiles.rows if form.kind == "fp8_block" else 0)


def groups_of_step(form: Form, tiles: Tiles) -> int:
    return max(tiles.depth // form.group, 1)


def row_counts(tiles: Tiles) -> tuple[int, ...]:
    """The numbers of rows that products are compiled for."""
    quarter = max(tiles.rows // 4, 16)
    return (*range(quarter, tiles.rows, quarter), tiles.rows)
