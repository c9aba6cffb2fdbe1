"""How the latent cache lies in memory.

T tokens of the step, row after row   R rows (sequences)   N query heads
C latent_dim, the rank of kv_b   H rope_dim   D = C + H, what the cache holds of a token
L layers   P pages in the pool   S tokens per page   M pages per row
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.tuning import key, up_to

FP8 = jnp.dtype(jnp.float8_e4m3fn)  # the 8-bit cache: largest value 448, no infinity
LANES = 128  # of a TPU's registers


class Pages(NamedTuple):
    """The cache of all layers, one array: a page is one contiguous block, whose first C columns
    are at once keys and values. For TPUs, D is filled up to a multiple of 128."""

    kv_LPSD: Any  # a jax array, or what stands for one: a shape, a sharding


def tuning_key(q_TNC, q_TNH, kv_LPSD, M: int, decode_only: bool) -> str:
    """What decides the kernels' tiles, for tuning.py. M, which may grow with a deployment's longest
    row, is rounded up too."""
    T, N, C = q_TNC.shape
    return key(
        phase="decode" if decode_only else "both", T=up_to(T), M=up_to(M), N=N, C=C,
        H=q_TNH.shape[2], S=kv_LPSD.shape[2], q=jnp.dtype(q_TNC.dtype).name,
        kv=jnp.dtype(kv_LPSD.dtype).name,
    )  # fmt: skip
