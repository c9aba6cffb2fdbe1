"""What decides the kernels' tiles, for tuning.py."""

import jax.numpy as jnp

from pallas_kernels.tuning import key, up_to


def tuning_key(q_BTNH, v_BTKV, *, causal: bool, window) -> str:
    """`window` is an int or, traced, anything else. The number of rows decides nothing."""
    (_, T, N, H), (K, V) = q_BTNH.shape, v_BTKV.shape[2:]
    constant = window is None or isinstance(window, int)
    return key(
        T=up_to(T), N=N, K=K, H=H, V=V, x=jnp.dtype(q_BTNH.dtype).name, causal=int(causal),
        window=str(window) if constant else "traced",
    )  # fmt: skip
