"""How far back causal attention sees: `window` tokens, a query's own included, and of those the
ones of its own chunk, where sequences are cut into chunks of `attention_chunk_size` tokens."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def into_chunk(position: Any, attention_chunk_size: int) -> Any:
    """How many tokens of a token's own chunk come before it; `position` is an int32 or an array."""
    if not attention_chunk_size & (attention_chunk_size - 1):  # division is long code on TPUs
        return position & (attention_chunk_size - 1)
    return lax.rem(position, jnp.full_like(position, attention_chunk_size))


def oldest(position: Any, window: Any, attention_chunk_size: int | None) -> Any:
    """The position, at least 0, of the oldest key that the query at `position` sees; None: all.
    From one position to the next it never falls."""
    first = jnp.zeros_like(position)
    if window is not None:
        first = jnp.maximum(position - window + 1, first)
    if attention_chunk_size is not None:
        first = jnp.maximum(position - into_chunk(position, attention_chunk_size), first)
    return first


def most(window: Any, attention_chunk_size: int | None) -> Any:
    """Of the tokens that a query sees, the largest number that is a constant: an int; where there
    is none, `window`, which is traced or None."""
    if attention_chunk_size is None:
        return window
    return min(window, attention_chunk_size) if isinstance(window, int) else attention_chunk_size


def check_chunk_size(attention_chunk_size: int | None) -> None:
    """Raises ValueError."""
    if attention_chunk_size is not None and attention_chunk_size < 1:
        raise ValueError(
            f"attention_chunk_size is {attention_chunk_size}; it must be at least 1, or None"
        )
