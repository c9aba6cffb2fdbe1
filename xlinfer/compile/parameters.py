"""Parameters on disk as they lie in memory: written by Orbax, read without it, since reading must
neither trace nor compile. Each array is read in the shards that the devices want.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from xlinfer.progress import Progress

READS = 4  # arrays that are read at once


def write_parameters(directory: Path, arrays: Mapping[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), {n: _storable(x) for n, x in arrays.items()})


def _storable(x: jax.Array) -> jax.Array:
    """uint4, which Orbax cannot write, as int4 of the same bits."""
    return jax.lax.bitcast_convert_type(x, "int4") if x.dtype == "uint4" else x


def read_parameters(
    directory: Path,
    names: Sequence[str],
    params: Sequence[jax.ShapeDtypeStruct],
    progress: Progress | None,
) -> tuple[jax.Array, ...]:
    """The arrays of these names, placed as `params` say. Raises ValueError where one is missing or
    of another shape or dtype."""
    import tensorstore as ts

    base = f"file://{directory.absolute()}/"
    open_one = lambda name: ts.open(
        {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}},
        open=True,
    )
    total, done, arrays = sum(p.size * p.dtype.itemsize for p in params), 0, []
    for at in range(0, len(names), READS):
        some = list(zip(names, params, strict=True))[at : at + READS]
        opened = [(name, p, open_one(name)) for name, p in some]
        for name, p, future in opened:
            try:
                held = future.result()
            except ValueError as error:
                raise ValueError(f"{directory}: {name} cannot be read: {error}") from None
            dtype = np.dtype(p.dtype)
            stored = np.dtype("int4") if dtype == "uint4" else dtype
            if held.shape != p.shape or held.dtype.numpy_dtype != stored:
                raise ValueError(
                    f"{directory}: {name} is {held.dtype.name}{list(held.shape)}; it must be "
                    f"{p.dtype.name}{list(p.shape)}"
                )
            read = lambda i, held=held, d=dtype: np.asarray(held[i].read().result()).view(d)
            assert p.sharding is not None
            arrays.append(jax.make_array_from_callback(p.shape, p.sharding, read))
            done += p.size * p.dtype.itemsize
            if progress:
                progress("load", done, total)
    return tuple(jax.block_until_ready(arrays))
