"""Tile choices that were measured, as `tools/gpu_check.sh` writes them to
`pallas_kernels/<op>/tuned/<device>.json`:

    {"op": "int4_matmul", "device": "h200", "date": "...", "versions": {"jax": "...", ...},
     "tiles": {"M=16,K=8192,N=28672": {"tiles": {"n": 128, "stages": 4}, "ms": 0.036,
                                       "default_ms": 0.041, "case": "llama3_70b_up_16"}}}

A key names the shape that a choice was measured for: `key(M=16, K=8192, N=28672)`. An op calls
`tuned` with the key of the shape at hand, makes its `Tiles` of the result, and keeps its heuristic
for None; `tuning_key(case)` in its cases.py says the key of a case.
"""

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from pallas_kernels.devices import Device


def key(**sizes: int | str) -> str:
    """The sizes and dtypes that decide a choice, in the order given: "M=16,K=8192,x=bfloat16"."""
    return ",".join(f"{name}={value}" for name, value in sizes.items())


def tuned(op: str, device: Device, key: str) -> dict[str, Any] | None:
    """The fields of the `Tiles` that were fastest on `device`; None where nobody measured."""
    found = _measured(op, device.name).get(key)
    return None if found is None else dict(found["tiles"])


@functools.cache
def _measured(op: str, device: str) -> Mapping[str, Mapping[str, Any]]:
    file = files("pallas_kernels") / op / "tuned" / f"{device}.json"
    return json.loads(file.read_text())["tiles"] if file.is_file() else {}
