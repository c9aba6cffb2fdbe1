"""How the latent cache lies in memory.

T tokens of the step, row after row   R rows (sequences)   N query heads
C latent_dim, the rank of kv_b   H rope_dim   D = C + H, what the cache holds of a token
L layers   P pages in the pool   S tokens per page   M pages per row
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

FP8 = jnp.dtype(jnp.float8_e4m3fn)  # the 8-bit cache: largest value 448, no infinity
LANES = 128  # of a TPU's registers


class Pages(NamedTuple):
    """The cache of all layers, one array: a page is one contiguous block, whose first C columns
    are at once keys and values. For TPUs, D is filled up to a multiple of 128."""

    kv_LPSD: Any  # a jax array, or what stands for one: a shape, a sharding
