"""The programs' arguments and results as JSON: which tuples they are made of, and of each array
its shape, dtype and place. No pickle, and no type is looked up by a name from a file: the few
that programs use stand in TYPES.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.paged_attention import PackedPages, Pages
from xlinfer.programs import Sampled
from xlinfer.sampling import Logprobs, SlotParams, Slots, SlotState

TYPES = {
    t.__name__: t for t in (Pages, PackedPages, Slots, SlotParams, SlotState, Sampled, Logprobs)
}
LEAF = "*"


def encode_tree(tree: Any) -> Any:
    """`tree`'s structure, each leaf as "*"."""
    if isinstance(tree, tuple):
        name = type(tree).__name__ if hasattr(tree, "_fields") else "tuple"
        if name != "tuple" and TYPES.get(name) is not type(tree):
            raise TypeError(f"{type(tree)} is not among the types that programs use")
        return [name, *map(encode_tree, tree)]
    if tree is None or isinstance(tree, dict | list):
        raise TypeError(f"a program's argument or result has a {type(tree).__name__} in it")
    return LEAF


def decode_tree(encoded: Any, leaves: Sequence[Any]) -> Any:
    """The tree of `leaves`. Raises ValueError unless `encoded` is what encode_tree writes."""
    rest = iter(leaves)
    tree = _decode(encoded, rest)
    if next(rest, rest) is not rest:
        raise ValueError("a tree has fewer leaves than arrays are given for it")
    return tree


def _decode(encoded: Any, leaves) -> Any:
    if encoded == LEAF:
        leaf = next(leaves, LEAF)
        if leaf is LEAF:
            raise ValueError("a tree has more leaves than arrays are given for it")
        return leaf
    match encoded:
        case ["tuple", *parts]:
            return tuple(_decode(part, leaves) for part in parts)
        case [str(name), *parts] if name in TYPES and len(parts) == len(TYPES[name]._fields):
            return TYPES[name](*(_decode(part, leaves) for part in parts))
    raise ValueError(f"{str(encoded)[:60]} is no tree of {', '.join(TYPES)}")


def encode_array(x: Any) -> dict[str, Any]:
    """Of an array or a jax.ShapeDtypeStruct with a NamedSharding."""
    names = [list(n) if isinstance(n, tuple) else n for n in x.sharding.spec]
    return {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name, "axes": names}


def decode_array(encoded: dict[str, Any], mesh: Mesh) -> jax.ShapeDtypeStruct:
    names = [tuple(n) if isinstance(n, list) else n for n in encoded["axes"]]
    lies = NamedSharding(mesh, PartitionSpec(*names))
    return jax.ShapeDtypeStruct(tuple(encoded["shape"]), np.dtype(encoded["dtype"]), sharding=lies)
