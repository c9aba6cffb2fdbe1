"""What the integers of quantized weights stand for: themselves, or the numbers of a short float."""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

# int: q is q. e2m1: q in -7..7 is the sign and the index of a magnitude of the 4-bit float
# (OCP MX), counted in its half steps: 0, 1, 2, 3, 4, 6, 8, 12, so that w = 0.5 is 1.
Grid = Literal["int", "e2m1"]
GRIDS: tuple[Grid, ...] = ("int", "e2m1")


def values(q: Any, grid: Grid) -> Any:
    """What integers in a float dtype stand for, exactly.

    The steps of e2m1 double past 4 and past 6: every q counts four times, less what does not
    count again.
    """
    if grid == "int":
        return q
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
