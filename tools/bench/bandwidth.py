"""Ceilings of this machine: memory bandwidth and float32 arithmetic.

Bytes read and bytes written both count. A decode step is bounded by the bytes of weights it
reads (`xla_matvec`), a prefill by arithmetic (`xla_matmul`).
"""

from concurrent.futures import ThreadPoolExecutor
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from tools.bench.report import measure

COPY_BYTES = 256 * 2**20  # far beyond any last-level cache
MATVEC = (4096, 4096)  # 64 MiB of float32
MATMUL = (512, 2048, 2048)  # a prefill step of 512 tokens
REPEATS = 9


def main() -> dict[str, float]:
    """Medians of nine: bandwidths in GB/s (10^9 bytes), arithmetic in GFLOP/s."""
    return {
        "numpy_copy_1_thread_GB_per_s": numpy_copy(threads=1),
        "numpy_copy_2_threads_GB_per_s": numpy_copy(threads=2),
        "xla_copy_GB_per_s": xla_copy(),
        "xla_matvec_float32_GB_per_s": xla_matvec(),
        "xla_matmul_float32_GFLOP_per_s": xla_matmul(),
    }


def numpy_copy(*, threads: int) -> float:
    """Into memory that has been touched before, each thread its own part."""
    source = np.ones(COPY_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        seconds = measure(
            lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)),
            repeats=REPEATS,
        )
    return 2 * COPY_BYTES / median(seconds) / 1e9


def xla_copy() -> float:
    """As part of a program, into donated memory: fresh memory costs page faults instead."""
    source = jnp.ones(COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda target, x: jnp.copy(x), donate_argnums=0, keep_unused=True)
    target = jnp.zeros_like(source)

    def call():
        nonlocal target
        target = jax.block_until_ready(copy(target, source))

    return 2 * COPY_BYTES / median(measure(call, repeats=REPEATS)) / 1e9


def xla_matvec() -> float:
    """One row times a weight matrix; only the matrix counts."""
    x_1D = jnp.ones((1, MATVEC[0]), jnp.float32)
    w_DF = jnp.ones(MATVEC, jnp.float32)
    product = jax.jit(lambda x, w: x @ w)
    seconds = measure(lambda: jax.block_until_ready(product(x_1D, w_DF)), repeats=REPEATS)
    return w_DF.nbytes / median(seconds) / 1e9


def xla_matmul() -> float:
    """Two operations for each of T × D × F multiply-adds."""
    T, D, F = MATMUL
    x_TD, w_DF = jnp.ones((T, D), jnp.float32), jnp.ones((D, F), jnp.float32)
    product = jax.jit(lambda x, w: jnp.dot(x, w, precision="highest"))
    seconds = measure(lambda: jax.block_until_ready(product(x_TD, w_DF)), repeats=REPEATS)
    return 2 * T * D * F / median(seconds) / 1e9
