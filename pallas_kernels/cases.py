"""What every op's `cases.py` offers, so that tests, the compile gate, benchmarks and tuning run
the same shapes.

    CASES           small shapes: every feature and edge, interpreted and held to the reference
    MODEL_CASES     shapes of published models: compiled for every device, timed on hardware
    inputs(case, key, impl)            the arguments, from jax.random alone: `jax.eval_shape` of it
                                       gives the compile gate its abstract arguments, and a
                                       benchmark makes gigabytes on the device
    call(case, impl, device, *, interpret=False)   the function of those arguments
    impls(case, device)                which implementations take the case there; the first is
                                       the one that the op itself would choose
    work(case)                         what the case costs, as Work

and, where an op has them:

    candidates(case, device)           tile choices worth measuring, each a NamedTuple, the
                                       heuristic's first; empty where there is nothing to choose.
                                       `call` then takes `tiles=` (None: the op's own choice)
    tuning_key(case, device)           where tuning.py keeps the best of them, and the op finds it
    DONATED                            positions of the arguments that are updated in place; they
                                       are the last of the outputs, in that order
    comparable(case, output)           the part of an output that every implementation must agree
                                       on, where that is not all of it

A Case is a NamedTuple whose first field is `name`, unique within the op.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Ops with the six names above, in the order the tables show them.
OPS = (
    "paged_attention",
    "mla_attention",
    "flash_attention",
    "int4_matmul",
    "fp8_matmul",
    "int8_matmul",
    "grouped_matmul",
)


def widened(args: tuple) -> tuple:
    """`inputs` with their 16-bit floats in float32, of which the reference makes a float32 result:
    an implementation is judged by its own rounding, not by its own and the reference's."""
    wide = lambda x: x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
    return jax.tree.map(wide, args)


class Work(NamedTuple):
    """The least that any implementation must do."""

    flops: int  # a multiply and an add count two; masked-out positions count nothing
    bytes: int  # read and written in device memory, everything once
    forbidden_bytes: int | None = None  # size of the dequantised copy that no program may make
    most_flops: int | None = None  # what an estimate says that cannot know a traced window
