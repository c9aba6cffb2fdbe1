"""Block-scaled FP8 product on TPU: x[M, K] bf16, rounded here to e4m3 (1x128 scales), by
w[N, K] e4m3 (128x128 scales).

x's tile is read and rounded once, when its first columns are computed, and stays in VMEM for
the others: XLA would write it three times in as many layouts.

Few tokens: bound by the bandwidth of HBM, so weights come in few blocks of megabytes. The
matrix unit sums 128 of K, the vector unit scales the sum and adds it up in float32: exact.
v5e and v5p have no fp8 matrix unit; there a tile is widened to bfloat16 in VMEM, exactly.

Many tokens: the vector unit scales M·N·K/128 sums, which v5e and v5p hide behind 128 times as
many products; on v6e and tpu7x the matrix unit is some eight times as fast and would wait for
it. There scales are folded into bfloat16 operands instead, and the matrix unit sums over all of
a block. The operands, not only their product, are then rounded to 8 bits.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.checks import check_multiple
from pallas_kernels.devices import Device
from pallas_kernels.fp8_matmul.reference import BLOCK, round_to_e4m3, scale_of

NATIVE = ("v6e", "tpu7x")  # devices whose matrix unit takes e4m3
FEW = 256  # tokens up to which scaling the sums costs less than scaling the weights


class Tiles(NamedTuple):
    M: int
    N: int  # a multiple of 128
    K: int  # a multiple of 128
    fold: bool  # scales go into the operands


def tiles(M: int, N: int, K: int, device: Device) -> Tiles:
    """Blocks of w of megabytes for few tokens, K cut evenly, x's rounded tile in a third of
    VMEM. A body's code grows with M·N·K/128 of a tile: these compile in seconds."""
    fold = M > FEW and device.name in NATIVE
    steps, most = pl.cdiv(K, BLOCK), 8 if fold or M <= FEW else 4
    per = next(p for p in range(most, 0, -1) if steps % p == 0)
    if per < most // 2:  # a prime number of blocks, say: the last step masks what is past the end
        per = min(most, steps)
    rows = 1024 if fold else 512
    while rows > FEW and rows * K * 2 > device.scratch_bytes // 3:
        rows //= 2
    wide = max(1024, min(4096, 2**17 // M))
    return Tiles(min(M, rows), min(wide, pl.cdiv(N, BLOCK) * BLOCK), per * BLOCK, fold)


def matmul(x_MK, w_LNK, w_scale_LNG, layer, *, device: Device, choice=None, interpret):
    """y_MN in x's dtype."""
    if x_MK.dtype == jnp.float16:  # which the chips cannot load
        x_MK = x_MK.astype(jnp.float32)
        how = {"device": device, "choice": choice, "interpret": interpret}
        return matmul(x_MK, w_LNK, w_scale_LNG, layer, **how).astype(jnp.float16)
    (M, K), N = x_MK.shape, w_LNK.shape[1]
    tile = choice or tiles(M, N, K, device)
    check_multiple("tiles.N", tile.N, BLOCK, why="a tile's columns share scales by 128")
    check_multiple("tiles.K", tile.K, BLOCK, why="scales change every 128 of K")
    per, steps = tile.K // BLOCK, pl.cdiv(K, tile.K)
    # A tail of K is masked in bfloat16.
    native = device.name in NATIVE and not tile.fold and not K % tile.K
    operand = w_LNK.dtype if native else jnp.bfloat16
    if tile.fold:
        folded = pltpu.VMEM((tile.N, tile.K), operand)
    else:
        folded = pltpu.VMEM((steps, tile.M, per), jnp.float32)
    item = x_MK.dtype.itemsize
    return pl.pallas_call(
        partial(_body, K=K, tile=tile, operand=operand),
        out_shape=jax.ShapeDtypeStruct((M, N), x_MK.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(M, tile.M), pl.cdiv(N, tile.N), steps),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                # After the first columns x's block stays the one that it was, and is not fetched.
                pl.BlockSpec(
                    (tile.M, tile.K), lambda m, n, k, _: (m, jnp.where(n == 0, k, steps - 1))
                ),
                pl.BlockSpec((None, tile.N, tile.K), lambda m, n, k, layer: (layer[0], n, k)),
            ],
            out_specs=pl.BlockSpec((tile.M, tile.N), lambda m, n, k, _: (m, n)),
            scratch_shapes=[
                pltpu.VMEM((tile.M, tile.N), jnp.float32),
                pltpu.VMEM((steps, tile.M, tile.K), operand),
                folded,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=device.scratch_bytes * 7 // 8,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * N * K,
            transcendentals=0,
            bytes_accessed=M * K * item + N * K + M * N * item,
        ),
        interpret=interpret,
        name="fp8_matmul",
    )(layer[None], w_scale_LNG[layer], x_MK, w_LNK)  # SMEM has no room for all layers' scales


def _body(
    _, sw_ref, x_ref, w_ref, o_ref, acc_ref, q_ref, more_ref, *, K: int, tile: Tiles, operand
):  # fmt: skip
    """`more_ref` has the scales of x's tile, or a tile of w with its scales folded in."""
    n, k = pl.program_id(1), pl.program_id(2)
    per, rows = tile.K // BLOCK, tile.N // BLOCK
    part = lambda i: slice(i * BLOCK, (i + 1) * BLOCK)

    def load(ref, at, j):
        """128 of K in float32, and nothing of what lies past the end."""
        x = ref[at, part(j)].astype(jnp.float32)
        if K % tile.K:
            column = (k * per + j) * BLOCK + lax.broadcasted_iota(jnp.int32, x.shape, 1)
            x = jnp.where(column < K, x, 0.0)
        return x

    def scale(i, j):
        """Of w's i-th 128 rows and j-th 128 columns; past the end, of the last ones."""
        last_n, last_k = sw_ref.shape[0] - 1, sw_ref.shape[1] - 1
        return sw_ref[jnp.minimum(n * rows + i, last_n), jnp.minimum(k * per + j, last_k)]

    @pl.when(n == 0)
    def _():
        for j in range(per):
            x = load(x_ref, slice(None), j)
            s = scale_of(jnp.max(jnp.abs(x), -1, keepdims=True))
            q = round_to_e4m3(x / s)
            if tile.fold:
                q = q.astype(jnp.float32) * s
            else:
                more_ref[k, :, j : j + 1] = s
            q_ref[k, :, part(j)] = q.astype(operand)

    @pl.when(k == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    if tile.fold:
        for j in range(per):
            for i in range(rows):
                more_ref[part(i), part(j)] = (load(w_ref, part(i), j) * scale(i, j)).astype(operand)
        acc_ref[...] += _dot(q_ref[k], more_ref[...])
    else:
        for j in range(per):
            if operand == w_ref.dtype:
                w = w_ref[:, part(j)]
            else:
                w = load(w_ref, slice(None), j).astype(operand)
            p = _dot(q_ref[k, :, part(j)], w)
            s = more_ref[k, :, j : j + 1]
            for i in range(rows):
                acc_ref[:, part(i)] += p[:, part(i)] * (s * scale(i, j))

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        o_ref[...] = acc_ref[...].astype(o_ref.dtype)


def _dot(x, w):
    over_k = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, w, over_k, preferred_element_type=jnp.float32)
