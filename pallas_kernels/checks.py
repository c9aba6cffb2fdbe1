"""What is wrong with an argument, said by its name, its value and what is allowed.

All raise ValueError, when a function is traced. An array's contents are looked at only where
they are at hand, outside of jit: `check_below`.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_rank(name: str, x: Any, rank: int) -> None:
    if x.ndim != rank:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must have {rank} axes")


def check_shape(name: str, x: Any, shape: Sequence[int], *, why: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}: {why}")


def check_dtype(name: str, x: Any, allowed: Collection[Any]) -> None:
    names = [jnp.dtype(d).name for d in allowed]
    if jnp.dtype(x.dtype).name not in names:
        raise ValueError(f"{name} is {jnp.dtype(x.dtype).name}; it must be {' or '.join(names)}")


def check_multiple(name: str, value: int, of: int, *, why: str) -> None:
    if value % of:
        raise ValueError(f"{name} is {value}; it must be a multiple of {of}: {why}")


def check_one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def check_below(name: str, x: Any, limit: int, *, why: str) -> None:
    """Indices in 0 to limit - 1; what is being traced has no contents yet, and passes."""
    if isinstance(x, Tracer):
        return
    values = np.asarray(x)
    wrong = values[(values < 0) | (values >= limit)]
    if wrong.size:
        raise ValueError(f"{name} has {wrong.flat[0]}; it must be in 0 to {limit - 1}: {why}")


def check_distance_bias(bias_NX: Any, N: int) -> None:
    """A number for each query head and each distance from -M to M, X being 2 M + 1."""
    name = "distance_bias_NX"
    check_dtype(name, bias_NX, ("float32",))
    check_rank(name, bias_NX, 2)
    if bias_NX.shape[1] % 2 == 0:
        raise ValueError(f"{name} has {bias_NX.shape[1]} distances; they must be 2 M + 1: -M to M")
    check_shape(name, bias_NX, (N, bias_NX.shape[1]), why="a row for each query head")
