"""Matmul with grouped integer weights on TPU: int4, and int8 through the same kernel.

Few tokens: bound by reading the weights, so blocks are about 1 MiB, and next by the vector unit
that widens them. A group's product is scaled rather than its weights, on [M, N] instead of
[N, K] numbers; groups narrower than the 128 lanes go through one product too, of as many copies
of x as there are groups in 128 lanes, each zero outside its own group.

Many tokens: bound by the matrix unit, which wants a long K. Weights are scaled in float32,
rounded to bfloat16 and multiplied over the whole block at once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import check_multiple
from pallas_kernels.devices import Device, MiB
from pallas_kernels.grids import Grid, values
from pallas_kernels.int4_matmul.tiles import Problem, op_of, problem_of, tuning_key
from pallas_kernels.tuning import tuned

LANES = 128
SUBLANES = 16  # of a packed pair of bfloat16 tiles
FEW_TOKENS = 128  # up to here a group's product is scaled rather than its weights


class Tiles(NamedTuple):
    tokens: int
    rows: int  # output features
    columns: int  # input features
    scale_after: bool


def largest_divisor(n: int, limit: int, unit: int) -> int:
    """The largest multiple of `unit` up to `limit` that divides n."""
    return next(d for d in range(limit // unit * unit, 0, -unit) if n % d == 0)


def choose_tiles(p: Problem) -> Tiles:
    (M, N, K), group = p[:3], p.K // p.G
    few = M <= FEW_TOKENS
    tokens = min(-(-M // SUBLANES) * SUBLANES, 1024)
    # More rows of int8 less its zero, or in narrow groups, and 1024 tokens do not fit in VMEM.
    rows = 1024 if p.bits == 8 and (p.zeros or group == 16) and not few else 2048
    # With 8 groups in a block its scales fill whole tiles, and nothing is copied to regroup them.
    units = (8 * group, max(group, LANES)) if group < K else (LANES,)
    unit = next((u for u in units if u <= 1024 and u % LANES == 0 and K % u == 0), LANES)
    return Tiles(tokens, largest_divisor(N, rows, LANES), largest_divisor(K, 1024, unit), few)


def best_tiles(p: Problem, device: Device) -> Tiles:
    """Those measured fastest, else what seems so."""
    measured = tuned(op_of(p), device, tuning_key(p), Tiles)
    return measured or choose_tiles(p)


def matmul(
    x_MK, w_LNK, scale_LGN, zero_LGN, layer_1, *,
    grid: Grid, device: Device, tiles: Tiles | None, interpret,
):  # fmt: skip
    (M, K), N, dtype = x_MK.shape, w_LNK.shape[1], x_MK.dtype
    check_multiple("K", K, LANES, why="blocks are whole lanes")
    check_multiple("N", N, LANES, why="blocks are whole lanes")
    t = tiles or best_tiles(problem_of(x_MK, w_LNK, scale_LGN, zero_LGN, grid), device)
    x_MK = jnp.pad(x_MK, ((0, -M % t.tokens), (0, 0)))
    if dtype == jnp.float16:  # the matrix unit has no float16
        x_MK, scale_LGN = x_MK.astype(jnp.bfloat16), scale_LGN.astype(jnp.float32)
        zero_LGN = None if zero_LGN is None else zero_LGN.astype(jnp.float32)
    if not interpret:  # else XLA may copy all of the weights to VMEM first
        w_LNK = pltpu.with_memory_space_constraint(w_LNK, pltpu.HBM)
    out = jnp.float32 if dtype == jnp.float16 else dtype
    y = kernel(t, M, x_MK, w_LNK, scale_LGN, zero_LGN, layer_1, grid, out, device, interpret)
    return y[:M].astype(dtype)


def kernel(
    t: Tiles, tokens, x_MK, w_LNK, scale_LGN, zero_LGN, layer_1, grid: Grid, out,
    device: Device, interpret: Any,
):  # fmt: skip
    """The product of all rows of x_MK, of which the first `tokens` count as work."""
    (M, K), (L, N, _), G = x_MK.shape, w_LNK.shape, scale_LGN.shape[1]
    group, steps = K // G, K // t.columns
    scales = max(
        t.columns // group, 1
    )  # rows of scale_GN in a block; one serves many blocks if G = 1
    of_layer = steps if G > 1 else 1  # blocks of scales
    sz = [a.reshape(L * of_layer, scales, N) for a in (scale_LGN, zero_LGN) if a is not None]

    def scale_block(m, n, k, layer):
        return layer[0] * of_layer + (k if G > 1 else 0), 0, n

    sz_spec = pl.BlockSpec((1, scales, t.rows), scale_block)
    body = functools.partial(
        _after if t.scale_after or G == 1 else _before, group=group, G=G, grid=grid
    )
    bytes_once = tokens * (K + N) * 2 + N * K * jnp.iinfo(w_LNK.dtype).bits // 8
    bytes_once += sum(a.size * a.dtype.itemsize for a in sz) // L
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(M // t.tokens, N // t.rows, steps),
            in_specs=[
                pl.BlockSpec((t.tokens, t.columns), lambda m, n, k, _: (m, k)),
                pl.BlockSpec((None, t.rows, t.columns), lambda m, n, k, layer: (layer[0], n, k)),
                *(sz_spec for _ in sz),
            ],
            out_specs=pl.BlockSpec((t.tokens, t.rows), lambda m, n, k, _: (m, n)),
            scratch_shapes=[pltpu.VMEM((t.tokens, t.rows), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((M, N), out),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=min(device.scratch_bytes, 48 * MiB),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * N * K, transcendentals=0, bytes_accessed=bytes_once
        ),
        name=f"{w_LNK.dtype.name}_matmul",
        interpret=interpret,
    )(layer_1, x_MK, w_LNK, *sz)


def _dot(a, b):
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _widen(w_ref, columns, grid: Grid):
    """What the integers stand for, in bfloat16."""
    return values(w_ref[:, columns].astype(jnp.bfloat16), grid)


def _after(_, x_ref, w_ref, s_ref, *refs, group: int, G: int, grid: Grid):
    *z_ref, o_ref, acc_ref = refs
    k, width = pl.program_id(2), x_ref.shape[1]

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    row = lambda ref, g: ref[0, g : g + 1].astype(jnp.float32)
    step = width if group > width else max(group, LANES)
    copies = max(step // group, 1) if G > 1 else 1
    total = jnp.zeros_like(acc_ref)
    for first in range(0, width, step):
        x = x_ref[:, first : first + step]
        if copies > 1:
            lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) // group
            x = jnp.concatenate([jnp.where(lane == j, x, jnp.zeros_like(x)) for j in range(copies)])
        p = _dot(x, _widen(w_ref, slice(first, first + step), grid))
        sums = x.astype(jnp.float32).sum(1, keepdims=True) if z_ref else None
        for j in range(copies):
            g = 0 if G == 1 else first // group + j
            mine = slice(j * x_ref.shape[0], (j + 1) * x_ref.shape[0])
            part = p[mine]
            if sums is not None:
                part -= sums[mine] * row(z_ref[0], g)
            total += part if G == 1 else part * row(s_ref, g)
    acc_ref[...] += total

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        acc = acc_ref[...]
        o_ref[...] = (acc * row(s_ref, 0) if G == 1 else acc).astype(o_ref.dtype)


def _before(_, x_ref, w_ref, s_ref, *refs, group: int, G: int, grid: Grid):
    del G
    *z_ref, o_ref, acc_ref = refs
    k, (rows, width) = pl.program_id(2), w_ref.shape

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    columns_of = lambda ref: ref[0].astype(jnp.float32).T  # [rows, groups]
    lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) // min(group, LANES)

    def spread(columns, first):
        """Each group's column over its lanes, for LANES lanes from `first` on."""
        g, spread = first // group, None
        for j in range(max(LANES // group, 1)):
            column = jnp.broadcast_to(columns[:, g + j : g + j + 1], (rows, LANES))
            spread = column if spread is None else jnp.where(lane == j, column, spread)
        return spread

    s, z = columns_of(s_ref), [columns_of(ref) for ref in z_ref]
    parts = []
    for first in range(0, width, LANES):
        w = values(w_ref[:, first : first + LANES].astype(jnp.float32), grid)
        for zeros in z:
            w = w - spread(zeros, first)
        parts.append((w * spread(s, first)).astype(jnp.bfloat16))
    acc_ref[...] += _dot(x_ref[...], jnp.concatenate(parts, axis=1))

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        o_ref[...] = acc_ref[...].astype(o_ref.dtype)
