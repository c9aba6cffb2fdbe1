"""What the integers of quantized weights stand for: themselves, the numbers of a short float, or
those of a codebook."""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from pallas_kernels.checks import check_one_of

# int: q is q. e2m1: q in -7..7 is the sign and the index of a magnitude of the 4-bit float
# (OCP MX), counted in its half steps: 0, 1, 2, 3, 4, 6, 8, 12, so that w = 0.5 is 1.
# A codebook (NF4, IQ4_NL): the 16 numbers that q in 0..15 is an index of.
Codebook = tuple[float, ...]
Grid = Literal["int", "e2m1"] | Codebook
CODES = 16


def dtype_of(grid: Grid, *, zeros: bool) -> str:
    """That of 4-bit weights; ValueError for a grid that is none, or that zeros do not go with."""
    if isinstance(grid, tuple):
        if len(grid) != CODES:
            raise ValueError(f"grid has {len(grid)} numbers; a codebook of 4 bits has {CODES}")
    else:
        check_one_of("grid", grid, ("int", "e2m1"))
    if zeros and grid != "int":
        raise ValueError(f"grid is {grid!r}, but zero is given; only integers have zeros")
    return "uint4" if zeros or isinstance(grid, tuple) else "int4"


def values(q: Any, grid: Grid) -> Any:
    """What integers in a float dtype stand for; e2m1 exactly, codebooks rounded to that dtype.

    The steps of e2m1 double past 4 and past 6: every q counts four times, less what does not
    count again. Of codebooks a tree of selects takes one half for every bit: XLA fuses it, where
    it would not fuse a gather.
    """
    if grid == "int":
        return q
    if isinstance(grid, tuple):
        bits, found = q.astype(jnp.int32), [jnp.asarray(n, q.dtype) for n in grid]
        for bit in range(CODES.bit_length() - 1):
            is_set = (bits >> bit) & 1 == 1
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [jnp.where(is_set, odd, even) for even, odd in pairs]
        return found[0]
    number = lambda n: jnp.asarray(n, q.dtype)
    within = lambda n: jnp.minimum(jnp.maximum(q, number(-n)), number(n))
    return number(4) * q - within(4) - number(2) * within(6)


def values_by_bits(q: Any, grid: Grid) -> Any:
    """`values` of bfloat16 in what Hopper does fastest: on a magnitude, a product, a sum and a
    comparison with zero are one instruction for two numbers. Taking the sign off and putting it
    back are one more each."""
    if grid == "int":
        return q
    number = lambda n: jnp.asarray(n, jnp.bfloat16)
    bits = lax.bitcast_convert_type(q, jnp.uint16)
    a = lax.bitcast_convert_type(bits & jnp.uint16(0x7FFF), jnp.bfloat16)
    past_4 = jnp.maximum(a - number(4), number(0))
    past_6 = jnp.maximum(number(2) * a - number(12), number(0))
    magnitude = lax.bitcast_convert_type(a + past_4 + past_6, jnp.uint16)
    return lax.bitcast_convert_type(magnitude | (bits & jnp.uint16(0x8000)), jnp.bfloat16)
