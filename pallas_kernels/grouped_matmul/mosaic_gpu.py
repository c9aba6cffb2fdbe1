"""Grouped products on Hopper: persistent, warp-specialised, weights on wgmma's M axis.

With few rows for each expert the kernel is bound by reading weights, with many by the tensor
cores, so one shape serves both: a tile is `cols` output features of each compute warpgroup times
`rows` rows of one expert, y transposed in the registers. Weights then need no more rows than a
multiple of 8, and integer weights are wgmma's register operand: they are widened there, exactly.
(While one warpgroup widens another multiplies. One alone cannot do both: ptxas makes every wgmma
wait if an operand's registers are written while it runs, so only the next step's packed weights
are fetched then.) Scales of groups multiply each group's product, in float32: a weight rounded
after scaling would cost a bfloat16 y its last bit.

A row tile starts at its group's first row or up to 7 before, at a multiple of 8, as the swizzle
asks. Its rows of other groups are multiplied and not stored: y goes out through SMEM, by TMA, in
pieces whose sizes are the powers of two that make up the tile's row count. That costs no copy of
x or y. A group's last tile loads and multiplies no more quarters of `rows` than it needs.

A producer warpgroup keeps `stages` steps of K in flight and runs on into the next tile while the
compute warpgroups store theirs. Tiles are handed out in a fixed order, in which `side` row tiles
share each block of weights while it is in L2.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import check_dtype, check_multiple
from pallas_kernels.devices import Device
from pallas_kernels.fp8_matmul.reference import quantize_tokens
from pallas_kernels.grouped_matmul.metadata import most_tiles, row_tiles
from pallas_kernels.grouped_matmul.mosaic_gpu_program import Program
from pallas_kernels.grouped_matmul.mosaic_gpu_tiles import (
    ALIGN,
    OUT,
    Tiles,
    best_tiles,
    groups_of_step,
)
from pallas_kernels.grouped_matmul.weights import BLOCK, Form
from pallas_kernels.hopper import swizzled


def check(x_MK, w_ENK) -> None:
    """What TMA asks for: rows of 16 bytes or a multiple."""
    _, N, K = w_ENK.shape
    check_dtype("x_MK", x_MK, ("bfloat16", "float16"))
    check_multiple("K of w_ENK", K, 64, why="mosaic_gpu loads whole swizzles")
    check_multiple("N of w_ENK", N, 8, why="mosaic_gpu stores 16 bytes at a time")
    if N < OUT or K < BLOCK:
        raise ValueError(f"w_ENK is {w_ENK.shape}; mosaic_gpu takes N from {OUT}, K from {BLOCK}")


def matmul(
    x_MK, w_ENK, group_sizes_E, scale, zero, base, form: Form, *,
    device: Device, tiles: Tiles | None, interpret: Any,
):  # fmt: skip
    check(x_MK, w_ENK)
    (M, K), N, dtype = x_MK.shape, w_ENK.shape[1], x_MK.dtype
    E = group_sizes_E.shape[0]
    tiles = tiles or best_tiles(x_MK, w_ENK, E, scale, zero, form, device)
    tile = row_tiles(group_sizes_E, M, tiles.rows, ALIGN)
    # TMA loads boxes of `rows` rows, swizzled by 8: a copy of x, but only where M is odd or small.
    pad = max(tiles.rows - M, -M % ALIGN)
    token_GM = None
    if form.is_fp8:
        x_MK, token_MG = quantize_tokens(x_MK, BLOCK if form.kind == "fp8_block" else K)
        # Transposed, a tile's scales of a step are a row. TMA asks for rows of whole 16 bytes.
        token_GM = jnp.pad(token_MG.T, ((0, 0), (0, pad)))
    if w_ENK.dtype == jnp.uint4:  # only signed integers widen fast: read as such, q ^ 8 is q - 8
        w_ENK = lax.bitcast_convert_type(w_ENK, jnp.int4)
    operands = {
        "x": jnp.pad(x_MK, ((0, pad), (0, 0))) if pad else x_MK,
        "w": w_ENK,
        "scale": scale,
        "zero": zero,
        "token": token_GM,
        "expert": base + tile.expert_T,
        "row": tile.row_T,
        "first": tile.first_T,
        "count": tile.count_T,
        "tiles": jnp.stack([tile.tiles, base + E]),  # how many, and the padding's expert
    }
    operands = {name: a for name, a in operands.items() if a is not None}
    blocks = -(-N // (tiles.cols * tiles.warpgroups))
    ctas = min(tiles.ctas or device.cores, most_tiles(M, E, tiles.rows, ALIGN) * blocks)
    scratch = _scratch(form, tiles, operands, dtype, interpret)

    def body(*refs, **smem):
        *inputs, y_g = refs
        inputs = dict(zip(operands, inputs, strict=True))
        Program(form, tiles, ctas, blocks, -(-K // tiles.depth), bool(interpret)).run(
            inputs, smem, y_g
        )

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=tiles.warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        kernel_name=f"grouped_matmul_{form.kind}",
        interpret=interpret or None,
    )
    return kernel(*operands.values())


def _scratch(form: Form, tiles: Tiles, operands, dtype, interpret) -> dict[str, Any]:
    """SMEM by the name of what it holds. Those of a stage come first in `_step_copies`."""
    T, width, w = tiles, tiles.cols * tiles.warpgroups, operands["w"].dtype
    # A swizzle must divide K, and what a product takes of K.
    columns = math.gcd(operands["w"].shape[2], T.depth)
    x_columns = math.gcd(columns, form.group)
    # Swizzled but not tiled: TMA can start at any of these rows.
    rows_of_128_bytes = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    scratch: dict[str, Any] = {
        "x": plgpu.SMEM(
            (T.stages, T.rows, T.depth),
            operands["x"].dtype,
            transforms=swizzled(operands["x"].dtype, x_columns),
        ),
        "w": plgpu.SMEM((T.stages, width, T.depth), w, transforms=swizzled(w, columns)),
        "y": plgpu.SMEM((T.warpgroups, T.rows, OUT), dtype, transforms=(rows_of_128_bytes,)),
    }
    if form.in_groups:
        for name in ("scale", "zero"):
            if name in operands:
                shape = (T.stages, groups_of_step(form, T), width)
                scratch[name] = plgpu.SMEM(shape, operands[name].dtype)
    elif form.kind == "fp8_block":
        scratch["token"] = plgpu.SMEM((T.stages, T.rows), jnp.float32)
    else:
        if form.kind in ("int8", "fp8_channel"):
            scratch["scale"] = plgpu.SMEM((width,), operands["scale"].dtype)
        if form.is_fp8:
            scratch["token"] = plgpu.SMEM((T.rows,), jnp.float32)
    vectors = [name for name in ("scale", "zero", "token") if name in scratch]
    scratch["full"] = plgpu.Barrier(
        num_arrivals=2 + len(vectors) * form.scales_vary_over_k, num_barriers=T.stages
    )
    scratch["free"] = plgpu.Barrier(num_arrivals=T.warpgroups, num_barriers=T.stages)
    if vectors and not form.scales_vary_over_k:
        scratch["tile_full"] = plgpu.Barrier(num_arrivals=len(vectors))
        scratch["tile_free"] = plgpu.Barrier(num_arrivals=T.warpgroups)
    if interpret and (form.kind == "int8" or form.in_groups):
        shape = (T.warpgroups, T.cols, min(form.group, T.depth))
        scratch["detour"] = plgpu.SMEM(shape, dtype)
    return scratch
