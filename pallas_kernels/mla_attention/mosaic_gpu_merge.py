"""Puts together the outputs of items that were cut into units (mosaic_gpu_schedule.py).

A unit's share of a row is its normalised output and the log2 of its softmax's denominator; the
row's output is their average, weighted by the denominators. Each warpgroup merges one row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUPS = 4
IN_FLIGHT = 8  # shares of a row that are read at once


def merge(o_XC, o_part_UhmC, lse_part_Uhm, merges_FI, *, heads: int, interpret):
    """o_XC with the rows of cut items written, in place; h tiles of m rows."""
    head_tiles, rows = lse_part_Uhm.shape[1:]
    o_ref = jax.new_ref(o_XC)
    plgpu.kernel(
        functools.partial(_body, heads=heads),
        grid=(head_tiles, rows // WARPGROUPS, merges_FI.shape[1]),
        grid_names=("head", "rows", "item"),
        num_threads=WARPGROUPS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(o_part_UhmC, lse_part_Uhm, merges_FI, o_ref)
    return jax.freeze(o_ref)


def _body(o_part_g, lse_part_g, merges_g, o_g, *, heads: int):
    C = o_part_g.shape[3]
    head, item = lax.axis_index("head"), lax.axis_index("item")
    row = lax.axis_index("rows") * WARPGROUPS + lax.axis_index("wg")
    token, queries, first, units = (merges_g[f, item] for f in range(4))
    group = min(heads, 64)
    layout = plgpu.Layout.WG_STRIDED((C,), vec_size=C // 128)

    @pl.when((units > 1) & (row // group < queries))
    def _():
        def step(i, carry):
            acc, peak, total = carry
            lse, o = [], []
            for k in range(IN_FLIGHT):
                unit = i * IN_FLIGHT + k
                slot = first + jnp.minimum(unit, units - 1)
                lse.append(jnp.where(unit < units, lse_part_g[slot, head, row], -jnp.inf))
                o.append(plgpu.load(o_part_g.at[slot, head, row], layout=layout))
            new = functools.reduce(jnp.maximum, lse, peak)
            shrink = jnp.exp2(peak - new)
            acc, total = acc * shrink, total * shrink
            for lse_k, o_k in zip(lse, o, strict=True):
                weight = jnp.exp2(lse_k - new)
                acc, total = acc + o_k * weight, total + weight
            return acc, new, total

        start = plgpu.layout_cast(jnp.zeros((C,), jnp.float32), layout)
        steps = (units + IN_FLIGHT - 1) // IN_FLIGHT
        carry = start, jnp.float32(-1e30), jnp.float32(0)
        acc, _, total = lax.fori_loop(0, steps, step, carry)
        x = token * heads + head * group + row
        o_g.at[x][...] = (acc / total).astype(o_g.dtype)
