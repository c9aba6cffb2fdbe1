"""Grouped products on TPU: row tiles at fixed places, visited once for each group in them.

The grid is (blocks of output features, visits); how many visits there are is known only when the
program runs, and the grid has exactly as many. A visit multiplies the whole tile by its expert's
block of weights, over all of K, and keeps the rows that are the expert's; those of a tile's other
visits stay, since the tile's output remains in VMEM until its last one. Experts without rows are
never read.

With few rows for each expert the kernel is bound by reading weights: blocks of some MiB, two in
flight. With many, by the matrix unit; then a tile that two groups share costs two products, so
tiles are no larger than a group is expected to be. Weights are widened in VMEM, block by block.
Scales multiply each group's product in float32. Groups narrower than the 128 lanes go through one
product of as many copies of the rows as there are groups in 128 lanes, each zero outside its
group: exact, and two or four times the work of the matrix unit, which few rows do not feel.

XLA lays out an array so as to pad it least: where K is not a multiple of 128 and N is, K is not
minor in memory, and the kernel takes [E, K, N], without a copy.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import check_dtype, check_multiple
from pallas_kernels.devices import Device, MiB
from pallas_kernels.fp8_matmul.reference import round_to_e4m3, scale_of
from pallas_kernels.grids import values
from pallas_kernels.grouped_matmul.metadata import tile_visits
from pallas_kernels.grouped_matmul.weights import BLOCK, Form, tuning_key
from pallas_kernels.tuning import tuned

LANES = 128
SUBLANES = 32  # rows that any dtype's tiles divide


class Tiles(NamedTuple):
    rows: int  # of x in a tile
    cols: int  # output features of a block


def choose_tiles(x_MK, w_ENK, E: int, form: Form, device: Device) -> Tiles:
    """Blocks of weights as large as VMEM allows where x must be read again for each of them, and
    of 4 MiB where it is small; not measured."""
    (M, K), N = x_MK.shape, w_ENK.shape[1]
    mean = -(-M // E)
    rows = min(max(64, 1 << (mean - 1).bit_length()), 256)
    rows = min(rows, -(-M // SUBLANES) * SUBLANES)
    budget = device.scratch_bytes // 12 if mean >= 64 else 4 * MiB
    # What a block costs in VMEM once it is widened.
    limit = max(budget // (K * 2) // LANES * LANES, LANES)
    return Tiles(rows, _block_of(N, min(limit, 2048)))


def best_tiles(x_MK, w_ENK, E: int, scale, form: Form, device: Device) -> Tiles:
    """Those measured fastest, else what seems so."""
    measured = tuned("grouped_matmul", device, tuning_key(x_MK, w_ENK, E, scale, form), Tiles)
    return measured or choose_tiles(x_MK, w_ENK, E, form, device)


def _block_of(N: int, limit: int) -> int:
    """The largest multiple of 128 up to `limit` that divides N, unless that is far smaller."""
    limit = min(limit, -(-N // LANES) * LANES)
    fitting = [c for c in range(limit, 0, -LANES) if N % c == 0]
    return fitting[0] if fitting and 2 * fitting[0] >= limit else limit


def matmul(
    x_MK, w_ENK, group_sizes_E, scale, zero, base, form: Form, *,
    device: Device, tiles: Tiles | None, interpret: Any,
):  # fmt: skip
    check_dtype("x_MK", x_MK, ("bfloat16", "float32"))  # the matrix unit has no float16
    check_multiple("K of w_ENK", w_ENK.shape[2], 64, why="mosaic_tpu cuts lanes there")
    (M, K), N, dtype = x_MK.shape, w_ENK.shape[1], x_MK.dtype
    E = group_sizes_E.shape[0]
    tiles = tiles or best_tiles(x_MK, w_ENK, E, scale, form, device)
    visits = tile_visits(group_sizes_E, M, tiles.rows)
    experts = (base + visits.expert_V, base + visits.weights_V)
    of_tile = lambda n, v, expert, weights, tile, *_: (tile[v], 0)
    of_block = lambda n, v, expert, weights, *_: (weights[v], n, 0)
    k_first = K % LANES != 0 and N % LANES == 0
    over_n = lambda n, v, expert, weights, *_: (weights[v], 0, n)
    operands, specs = [], []

    def add(a, block, index, **options):
        operands.append(a)
        specs.append(pl.BlockSpec(block, index, **options))

    token_MG = None
    if form.is_fp8:
        x_MK, token_MG = _round(x_MK, form.group, device, interpret)
    add(x_MK, (tiles.rows, K), of_tile)
    w = jnp.swapaxes(w_ENK, 1, 2) if k_first else w_ENK
    if not interpret:  # else XLA may copy all of the weights to VMEM first
        w = pltpu.with_memory_space_constraint(w, pltpu.HBM)
    if k_first:
        add(w, (1, K, tiles.cols), over_n)
    else:
        add(w, (1, tiles.cols, K), of_block)
    if token_MG is not None:
        add(token_MG, (tiles.rows, token_MG.shape[1]), of_tile)
    if form.kind == "fp8_block":
        all_of = lambda n, v, expert, weights, *_: (weights[v], 0, 0)
        add(scale, (1, *scale.shape[1:]), all_of, memory_space=pltpu.SMEM)
    elif form.kind == "fp8_tensor":
        add(scale[:, None, None], (1, 1, 1), lambda n, v, e, weights, *_: (weights[v], 0, 0))
    elif scale is not None:
        scale = scale[:, None] if scale.ndim == 2 else scale
        for a in (scale, zero):
            if a is not None:
                add(a, (1, a.shape[1], tiles.cols), over_n)
    read = min(E, M)  # experts
    weight_bytes = sum(
        a.size * jax.dtypes.itemsize_bits(a.dtype) // 8
        for a in (w_ENK, scale, zero)
        if a is not None
    )
    return pl.pallas_call(
        functools.partial(_visit, form=form, k_first=k_first, narrow=device.name == "tpu7x"),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(-(-N // tiles.cols), visits.visits),
            in_specs=specs,
            out_specs=pl.BlockSpec(
                (tiles.rows, tiles.cols), lambda n, v, e, w, tile, *_: (tile[v], n)
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((M, N), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=device.scratch_bytes * 3 // 4,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            transcendentals=0,
            bytes_accessed=weight_bytes // w_ENK.shape[0] * read + M * (K + N) * dtype.itemsize,
        ),
        name=f"grouped_matmul_{form.kind}",
        interpret=interpret,
    )(*experts, *visits[2:5], *operands)


def _round(x_MK, group: int, device: Device, interpret: Any):
    """fp8_matmul's quantize_tokens, which XLA would do by way of two float32 copies of x."""
    (M, K), G = x_MK.shape, -(-x_MK.shape[1] // group)
    rows = min(256, -(-M // SUBLANES) * SUBLANES)

    def body(x_ref, q_ref, token_ref):
        for g in range(G):
            k = slice(g * group, min((g + 1) * group, K))
            x = x_ref[:, k].astype(jnp.float32)
            token = scale_of(jnp.abs(x).max(1, keepdims=True))
            q_ref[:, k] = round_to_e4m3(x / token)
            token_ref[:, g : g + 1] = token

    block = lambda columns: pl.BlockSpec((rows, columns), lambda m: (m, 0))
    return pl.pallas_call(
        body,
        grid=(-(-M // rows),),
        in_specs=[block(K)],
        out_specs=[block(K), block(G)],
        out_shape=[
            jax.ShapeDtypeStruct((M, K), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((M, G), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=device.scratch_bytes * 3 // 4
        ),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=M * K * (x_MK.dtype.itemsize + 1)
        ),
        name="round_tokens",
        interpret=interpret,
    )(x_MK)


def _visit(
    expert, weights, tile, first, end, x_ref, w_ref, *refs,
    form: Form, k_first: bool, narrow: bool,
):  # fmt: skip
    *scales, y_ref = refs
    n, v = pl.program_id(0), pl.program_id(1)
    has_rows = expert[v] <= weights[v]  # padding's number is above every expert's
    opens = first[v] == 0
    K, cols = x_ref.shape[1], y_ref.shape[1]

    def product(x, k: slice):
        """x times the weights of features k, in float32. Integers and, but for chips that
        multiply it, e4m3 become bfloat16."""
        w = w_ref[0, k] if k_first else w_ref[0, :, k]
        if x.dtype == jnp.float8_e4m3fn and not narrow:
            x = x.astype(jnp.bfloat16)
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return lax.dot_general(
            x, values(w.astype(x.dtype), form.grid), (((1,), (0 if k_first else 1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    @pl.when(jnp.logical_not(has_rows) & opens)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)

    @pl.when(has_rows)
    def _():
        if form.in_groups:
            y = _groups(product, x_ref, scales, form.group)
        elif form.kind == "fp8_block":
            token_ref, scale_ref = scales
            y = _fp8_blocks(product, x_ref, token_ref, scale_ref, n, cols)
        else:
            y = product(x_ref[...], slice(0, K))
            if form.is_fp8:
                y = y * scales[0][...]
            if scales:
                y = y * scales[-1][0].astype(jnp.float32)
        y = y.astype(y_ref.dtype)
        row = lax.broadcasted_iota(jnp.int32, y.shape, 0)
        mine = (row >= first[v]) & (row < end[v])

        @pl.when(opens)
        def _():
            y_ref[...] = jnp.where(mine, y, jnp.zeros_like(y))

        @pl.when(jnp.logical_not(opens))
        def _():
            y_ref[...] = jnp.where(mine, y, y_ref[...])


def _fp8_blocks(product, x_ref, token_ref, scale_ref, n, cols: int):
    rows, K = x_ref.shape
    total = jnp.zeros((rows, cols), jnp.float32)
    first, most = n * (cols // BLOCK), scale_ref.shape[1] - 1
    for g in range(-(-K // BLOCK)):
        k = slice(g * BLOCK, min((g + 1) * BLOCK, K))
        scale = [
            jnp.full((1, BLOCK), scale_ref[0, jnp.minimum(first + i, most), g])
            for i in range(cols // BLOCK)
        ]
        total += product(x_ref[:, k], k) * token_ref[:, g : g + 1] * jnp.concatenate(scale, axis=1)
    return total


def _groups(product, x_ref, scales, group: int):
    rows, K = x_ref.shape
    scale_ref, *zero_ref = scales
    total = jnp.zeros((rows, scale_ref.shape[2]), jnp.float32)
    step = max(group, LANES)
    for start in range(0, K, step):
        k = slice(start, min(start + step, K))
        x = x_ref[:, k]
        copies = x.shape[1] // group
        if copies > 1:
            group_of = lax.broadcasted_iota(jnp.int32, x.shape, 1) // group
            x = jnp.concatenate(
                [jnp.where(group_of == j, x, jnp.zeros_like(x)) for j in range(copies)]
            )
        parts = product(x, k)
        for j in range(copies):
            row = lambda ref, g=start // group + j: ref[0, g : g + 1].astype(jnp.float32)
            mine = slice(j * rows, (j + 1) * rows)
            part = parts[mine]
            if zero_ref:
                part -= x[mine].astype(jnp.float32).sum(1, keepdims=True) * row(zero_ref[0])
            total += part * row(scale_ref)
    return total
