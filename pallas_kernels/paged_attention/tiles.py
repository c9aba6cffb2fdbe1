"""What the tiles of the kernels' two programs, of decode rows and of the others, follow from, and
what replaces them."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from pallas_kernels.tuning import key, up_to


class PhaseTiles(NamedTuple):
    """Instead of the kernel's own choice; None keeps it. On GPUs a DecodeTiles and a PrefillTiles,
    on TPUs two Tiles, of which decode's has one query."""

    decode: Any
    prefill: Any


class Shape(NamedTuple):
    """What a model and its cache decide."""

    N: int
    K: int
    H: int
    S: int
    dtype: Any  # of q
    kv_dtype: Any

    @property
    def G(self) -> int:
        return self.N // self.K


def tuning_key(
    phase: Literal["decode", "prefill"], count: int, shape: Shape, window: int | None
) -> str:
    """For `count` rows of a decode, tokens of a prefill. `window` is None where it is traced, or
    the kernel does not ask for it."""
    return key(
        phase=phase, **{"R" if phase == "decode" else "T": up_to(count)},
        N=shape.N, K=shape.K, H=shape.H, S=shape.S, q=jnp.dtype(shape.dtype).name,
        kv=jnp.dtype(shape.kv_dtype).name, **({} if window is None else {"window": window}),
    )  # fmt: skip
