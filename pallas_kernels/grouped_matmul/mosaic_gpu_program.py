"""What one thread block of the grouped product on Hopper does; see mosaic_gpu.py."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grids import values_by_bits
from pallas_kernels.grouped_matmul.mosaic_gpu_tiles import (
    ALIGN,
    OUT,
    Tiles,
    groups_of_step,
    row_counts,
)
from pallas_kernels.grouped_matmul.weights import BLOCK, Form
from pallas_kernels.hopper import ACC

ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
# For each thread of the producer, and of one of 1, 2, 3 or 4 compute warpgroups: 512 in all.
REGISTERS = {1: (40, 240), 2: (40, 232), 3: (32, 160), 4: (32, 120)}


class Tile(NamedTuple):
    """What a thread needs to know of the tile at hand."""

    expert: Any
    has_rows: Any  # else it is padding
    row: Any  # where it starts
    first: Any  # of its rows, the first that is the expert's
    count: Any  # of the expert's rows
    col: Any  # the first output feature


class Program(NamedTuple):
    """One thread block's program. `g` are the operands in device memory, `s` SMEM and barriers,
    both by name."""

    form: Form
    tiles: Tiles
    ctas: int
    blocks: int  # of output features
    steps: int  # of K
    interpret: bool

    def run(self, g, s, y_g) -> None:
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        count = lax.div(g["tiles"][0] * self.blocks - cta + (self.ctas - 1), jnp.int32(self.ctas))
        tile_of = lambda i: self.tile(g, cta + i * self.ctas)
        few, many = REGISTERS[self.tiles.warpgroups]

        @pl.when(wg == self.tiles.warpgroups)
        def _():
            plgpu.set_max_registers(few, action="decrease")
            self.produce(g, s, tile_of, count)

        @pl.when(wg < self.tiles.warpgroups)
        def _():
            plgpu.set_max_registers(many, action="increase")
            self.compute(g, s, y_g, wg, tile_of, count)

    def tile(self, g, i) -> Tile:
        """Bands of `side` row tiles; within one, the row tiles run before the blocks."""
        tiles, T = g["tiles"][0], self.tiles
        band = lax.div(i, jnp.int32(T.side * self.blocks))
        within = i - band * (T.side * self.blocks)
        side = jnp.minimum(tiles - band * T.side, T.side)
        t, n = band * T.side + lax.rem(within, side), lax.div(within, side)
        expert = g["expert"][t]
        has_rows = expert < g["tiles"][1]
        row = pl.multiple_of(g["row"][t], ALIGN)
        col = n * (T.cols * T.warpgroups)
        return Tile(expert, has_rows, row, g["first"][t], g["count"][t], col)

    def slot(self, step):
        return lax.rem(step, jnp.int32(self.tiles.stages))

    def for_rows(self, tile: Tile, body) -> None:
        """Runs body(rows) for the smallest of `row_counts` that holds the tile's rows; not at all
        for padding."""
        need, least = tile.first + tile.count, 0
        for rows in row_counts(self.tiles):
            fits = tile.has_rows & (need > least) & (need <= rows)
            pl.when(fits)(lambda rows=rows: body(rows))
            least = rows

    def after(self, tile: Tile, before):
        """Steps of K up to the end of a tile; padding takes none."""
        return before + jnp.where(tile.has_rows, self.steps, 0)

    def produce(self, g, s, tile_of, count) -> None:
        def one_tile(i, before):
            tile = tile_of(i)
            self.for_rows(tile, lambda rows: self.load(g, s, tile, before, rows))
            return self.after(tile, before)

        steps = lax.fori_loop(0, count, one_tile, jnp.int32(0))

        # Every phase of a barrier must be seen by someone, or the interpreter calls it a fault.
        @pl.loop(jnp.maximum(steps - self.tiles.stages, 0), steps)
        def _(step):
            plgpu.barrier_wait(s["free"].at[self.slot(step)])

        if "tile_full" in s:

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_wait(s["tile_free"])

    def load(self, g, s, tile: Tile, before, rows: int) -> None:
        @pl.loop(0, self.steps)
        def _(k):
            now = self.slot(before + k)

            @pl.when(before + k >= self.tiles.stages)
            def _():
                plgpu.barrier_wait(s["free"].at[now])

            for source, target in self.step_copies(g, s, tile, k, now, rows):
                plgpu.copy_gmem_to_smem(source, target, s["full"].at[now])

        if "tile_full" in s:

            @pl.when(before > 0)
            def _():
                plgpu.barrier_wait(s["tile_free"])

            for source, target in self.tile_copies(g, s, tile, rows):
                plgpu.copy_gmem_to_smem(source, target, s["tile_full"])

    def step_copies(self, g, s, tile: Tile, k, now, rows: int):
        """What a stage holds: a step of K of the rows and of the weights, with their scales."""
        T = self.tiles
        inner, cols = pl.ds(k * T.depth, T.depth), pl.ds(tile.col, T.cols * T.warpgroups)
        yield g["w"].at[tile.expert, cols, inner], s["w"].at[now]
        yield g["x"].at[pl.ds(tile.row, rows), inner], s["x"].at[now, :rows]
        if self.form.in_groups:
            first = lax.div(k * T.depth, jnp.int32(self.form.group))
            groups = pl.ds(first, groups_of_step(self.form, T))
            for name in ("scale", "zero"):
                if name in g:
                    yield g[name].at[tile.expert, groups, cols], s[name].at[now]
        if self.form.kind == "fp8_block":
            yield g["token"].at[k, pl.ds(tile.row, rows)], s["token"].at[now, :rows]

    def tile_copies(self, g, s, tile: Tile, rows: int):
        """Scales that hold for all of K."""
        T = self.tiles
        if "scale" in s:
            yield g["scale"].at[tile.expert, pl.ds(tile.col, T.cols * T.warpgroups)], s["scale"]
        if "token" in s:
            yield g["token"].at[0, pl.ds(tile.row, rows)], s["token"].at[:rows]

    def compute(self, g, s, y_g, wg, tile_of, count) -> None:
        cols = self.tiles.cols
        mine = pl.ds(pl.multiple_of(wg * cols, cols), cols)  # of a block's output features
        sum_of = {
            "int8": self.sum_from_registers,
            "int4": self.sum_of_groups,
            "int8_groups": self.sum_of_groups,
            "fp8_block": self.sum_of_blocks,
        }.get(self.form.kind, self.sum_from_smem)

        def one_tile(i, before):
            tile = tile_of(i)

            def product(rows):
                sum_nm = sum_of(g, s, tile, before, wg, mine, rows)
                if "tile_full" in s:
                    sum_nm = self.scaled(g, s, tile, sum_nm, mine, rows)
                self.store(s["y"].at[wg], y_g, tile, sum_nm.astype(y_g.dtype), wg, rows)

            @pl.when(jnp.logical_not(tile.has_rows))
            def _():
                rows = self.tiles.rows
                self.store(s["y"].at[wg], y_g, tile, jnp.zeros((cols, rows), y_g.dtype), wg, rows)

            self.for_rows(tile, product)
            return self.after(tile, before)

        lax.fori_loop(0, count, one_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def sum_from_smem(self, g, s, tile: Tile, before, wg, mine, rows: int):
        """Weights times rows over all of K, [cols, rows]: one product always in flight."""

        def run(sum_ref):
            @pl.loop(0, self.steps)
            def _(k):
                now = self.slot(before + k)
                plgpu.barrier_wait(s["full"].at[now])
                plgpu.wgmma(sum_ref, s["w"].at[now, mine], s["x"].at[now, :rows].T)
                plgpu.wgmma_wait(1)  # the step before is done with its stage

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(s["free"].at[self.slot(before + k - 1)])

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(s["free"].at[self.slot(before + self.steps - 1)])
            return sum_ref[...]

        return pl.run_scoped(run, ACC((self.tiles.cols, rows), jnp.float32))

    def sum_from_registers(self, g, s, tile: Tile, before, wg, mine, rows: int):
        """The same for int8."""

        def run(sum_ref):
            def one_step(k, packed):
                self.multiply(sum_ref, self.widened(s, packed), s, before + k, wg, 0, rows)
                packed = self.packed(s, before + k + 1, mine) if k is not last else None
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(s["free"].at[self.slot(before + k)])
                return packed

            last = self.steps - 1
            one_step(last, lax.fori_loop(0, last, one_step, self.packed(s, before, mine)))
            return sum_ref[...]

        return pl.run_scoped(run, ACC((self.tiles.cols, rows), jnp.float32))

    def sum_of_groups(self, g, s, tile: Tile, before, wg, mine, rows: int):
        """The same for integers in groups: each product is scaled in float32 and then added."""
        shape = (self.tiles.cols, rows)
        group = min(self.form.group, self.tiles.depth)
        groups = self.tiles.depth // group

        def one_step(k, carry):
            sum_nm, packed = carry
            now, w_nK = self.slot(before + k), self.widened(s, packed)
            for i in range(groups):
                w_nk = self.minus_zero(s, now, mine, i, w_nK[:, i * group : (i + 1) * group])
                ahead = i == groups - 1 and k is not last

                def product(ref, w_nk=w_nk, i=i, ahead=ahead):
                    self.multiply(ref, w_nk, s, before + k, wg, i, rows)
                    packed = self.packed(s, before + k + 1, mine) if ahead else None
                    plgpu.wgmma_wait(0)
                    return ref[...], packed

                part_nm, packed = pl.run_scoped(product, ACC(shape, jnp.float32))
                scale_n = plgpu.load(s["scale"].at[now, i, mine], layout=ROW).astype(jnp.float32)
                sum_nm += part_nm * lax.broadcast_in_dim(scale_n, shape, [0])
            plgpu.commit_smem()  # so that TMA may write where this has read
            plgpu.barrier_arrive(s["free"].at[now])
            return sum_nm, packed

        last = self.steps - 1
        start = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        carry = lax.fori_loop(0, last, one_step, (start, self.packed(s, before, mine)))
        return one_step(last, carry)[0]

    def packed(self, s, step, mine):
        """A step's integer weights as they are."""
        layout = plgpu.Layout
        narrow = layout.WGMMA_UPCAST_4X if self.form.kind == "int4" else layout.WGMMA_UPCAST_2X
        plgpu.barrier_wait(s["full"].at[self.slot(step)])
        packed = plgpu.load(s["w"].at[self.slot(step), mine], layout=narrow)
        if self.form.kind == "int8":
            plgpu.commit_smem()  # so that TMA may write where this has read
        return packed

    def widened(self, s, packed):
        """In x's dtype, which holds them exactly, laid out for wgmma; uint4 less 8."""
        if "zero" in s and self.form.kind == "int4":
            packed ^= jnp.asarray(-8, packed.dtype)
        w_nK = plgpu.layout_cast(packed, plgpu.Layout.WGMMA).astype(jnp.bfloat16)
        w_nK = values_by_bits(w_nK, self.form.grid)
        return (
            w_nK if s["y"].dtype == jnp.bfloat16 else w_nK.astype(jnp.float32).astype(s["y"].dtype)
        )

    def minus_zero(self, s, now, mine, i: int, w_nk):
        if "zero" not in s:
            return w_nk
        zero_n = plgpu.load(s["zero"].at[now, i, mine], layout=ROW)
        if self.form.kind == "int4":
            zero_n -= jnp.asarray(8, zero_n.dtype)
        return w_nk - lax.broadcast_in_dim(zero_n.astype(w_nk.dtype), w_nk.shape, [0])

    def multiply(self, sum_ref, w_nk, s, step, wg, i: int, rows: int) -> None:
        """Starts sum_ref += w_nk times the i-th share of a step's rows."""
        share = w_nk.shape[1]
        x_mk = s["x"].at[self.slot(step), :rows, i * share : (i + 1) * share]
        if self.interpret:  # which knows no register operands
            s["detour"].at[wg][...] = w_nk
            plgpu.commit_smem()
            plgpu.wgmma(sum_ref, s["detour"].at[wg], x_mk.T)
        else:
            plgpu.wgmma(sum_ref, w_nk, x_mk.T)

    def sum_of_blocks(self, g, s, tile: Tile, before, wg, mine, rows: int):
        """The same for e4m3 blocks: each step's product is scaled in float32 and then added."""
        shape = (self.tiles.cols, rows)
        # Past N, where nothing is stored, any block will do.
        block = lax.div(tile.col + wg * self.tiles.cols, jnp.int32(BLOCK))
        block = jnp.minimum(block, g["scale"].shape[1] - 1)

        def one_step(k, sum_nm):
            now = self.slot(before + k)
            scale = g["scale"][tile.expert, block, k]  # ahead of the wait, to hide its latency
            plgpu.barrier_wait(s["full"].at[now])
            token_m = plgpu.load(s["token"].at[now, :rows], layout=COLUMN) * scale

            def product(ref):
                plgpu.wgmma(ref, s["w"].at[now, mine], s["x"].at[now, :rows].T)
                return ref[...]

            part_nm = pl.run_scoped(product, ACC(shape, jnp.float32))
            plgpu.commit_smem()  # so that TMA may write where this has read
            plgpu.barrier_arrive(s["free"].at[now])
            return sum_nm + part_nm * lax.broadcast_in_dim(token_m, shape, [1])

        start = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, self.steps, one_step, start)

    def scaled(self, g, s, tile: Tile, sum_nm, mine, rows: int):
        """Times the scales that hold for all of K."""
        plgpu.barrier_wait(s["tile_full"])
        if "scale" in s:
            scale_n = plgpu.load(s["scale"].at[mine], layout=ROW).astype(jnp.float32)
            sum_nm = sum_nm * lax.broadcast_in_dim(scale_n, sum_nm.shape, [0])
        if "token" in s:
            token_m = plgpu.load(s["token"].at[:rows], layout=COLUMN)
            if self.form.kind == "fp8_tensor":
                token_m = token_m * g["scale"][tile.expert]
            sum_nm = sum_nm * lax.broadcast_in_dim(token_m, sum_nm.shape, [1])
        plgpu.commit_smem()  # so that TMA may write where this has read
        plgpu.barrier_arrive(s["tile_free"])
        return sum_nm

    def store(self, y_s, y_g, tile: Tile, y_nm, wg, rows: int) -> None:
        """The tile's own rows, in pieces of as many rows as the bits of their number say."""
        T = self.tiles
        for piece in range(T.cols // OUT):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            y_om = y_nm[piece * OUT : (piece + 1) * OUT]
            y_s.at[:rows].T[...] = plgpu.layout_cast(y_om, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            cols = pl.ds(tile.col + wg * T.cols + piece * OUT, OUT)
            most = min(rows, y_g.shape[0]).bit_length()
            for size in (1 << bit for bit in reversed(range(most))):

                @pl.when(tile.count & size != 0)
                def _(size=size, cols=cols):
                    first = tile.first + (tile.count & (-2 * size))
                    target = y_g.at[pl.ds(tile.row + first, size), cols]
                    plgpu.copy_smem_to_gmem(y_s.at[pl.ds(first, size)], target)
