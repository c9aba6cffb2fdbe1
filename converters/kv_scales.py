"""The scales of an 8-bit KV cache: what a stored number is multiplied by, for each layer and for k
and v, in the names that files have for them.

compressed-tensors  self_attn.k_scale, v_scale [1], or [K, 1, 1] by kv head
                    until 2024 self_attn.k_proj.output_scale, v_proj.output_scale
ModelOpt            self_attn.k_proj.k_scale, v_proj.v_scale []
AutoFP8             self_attn.kv_scale [], of both
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from converters.errors import CheckpointError
from converters.rules import Row

# Of queries, probabilities and outputs, for products in fp8, which attention does not compute: it
# multiplies q by k as floats. They change nothing.
UNUSED = re.compile(
    r".*\.(q_scale|prob_scale|prob_output_scale|(q_proj|o_proj|\w*attn|attention)\.output_scale)"
)
KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")  # of a quantization_config


def kv_scale_rows(k: str, v: str) -> tuple[Row, ...]:
    """Of a layer whose products of k and v have these names."""
    rows = []
    for part, product in (("k", k), ("v", v)):
        attention = product.rpartition(".")[0]
        others = (
            f"{product}.{part}_scale", f"{product}.output_scale", f"{attention}.kv_scale",
        )  # fmt: skip
        target = f"layers.attn.{part}_scale_K"
        rows.append(Row(target, f"{attention}.{part}_scale", "K -> K", aliases=others))
    return tuple(rows)


def has_kv_scales(where: str, values: Mapping[str, Any]) -> bool:
    """Whether the quantization_config `values` says that the file has scales of an e4m3 cache.
    Raises CheckpointError, beginning with `where`, for another kind of cache."""
    scheme, algorithm = (values.get(name) for name in KEYS)
    if algorithm is not None and algorithm != "FP8":
        raise CheckpointError(
            f"{where}: 'kv_cache_quant_algo' is {algorithm!r}; xlinfer reads 'FP8' and null"
        )
    if scheme is None or scheme == "static":  # the word is AutoFP8's
        return scheme is not None or algorithm is not None
    wanted: Mapping[str, tuple[Any, ...]] = {
        "num_bits": (8,),
        "type": ("float",),
        "symmetric": (None, True),
        "dynamic": (None, False),
        "strategy": (None, "tensor", "attn_head"),
    }
    if not isinstance(scheme, dict):
        raise CheckpointError(f"{where}: 'kv_cache_scheme' is {scheme!r}; it must be an object")
    for name, allowed in wanted.items():
        if scheme.get(name) not in allowed:
            raise CheckpointError(
                f"{where}: 'kv_cache_scheme' has {name} {scheme.get(name)!r}; xlinfer reads "
                + " or ".join(repr(value) for value in allowed if value is not None)
            )
    return True


def unused(names: Iterable[str]) -> tuple[str, ...]:
    """Those that are scales which nothing is computed with."""
    return tuple(name for name in names if UNUSED.fullmatch(name))


def is_kv_scale(name: str) -> bool:
    """Whether it may be one of a cache."""
    return re.fullmatch(r".*(\.(k|v|kv)_scale|[kv]_proj\.output_scale)", name) is not None


def check_scale(scale: np.ndarray, where: str) -> np.ndarray:
    """`scale` in float32. Raises CheckpointError, beginning with `where`, unless all are finite and
    above 0."""
    found = scale.astype(np.float32).reshape(-1)
    bad = found[~(np.isfinite(found) & (found > 0))]
    if len(bad):
        raise CheckpointError(f"{where} holds {bad[0]:g}; a scale must be finite and above 0")
    return found
