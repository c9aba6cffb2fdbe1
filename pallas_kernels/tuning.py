"""Tile choices that were measured, as `tools/gpu_check.sh` writes them to
`pallas_kernels/<op>/tuned/<device>.json`:

    {"op": "fp8_matmul", "device": "h200", "date": "...", "versions": {"jax": "...", ...},
     "tiles": {"M=16,N=7168,K=18432,x=bfloat16": {
         "tiles": {"kind": "DecodeTiles", "split": 4, "stages": 6},
         "ms": 0.036, "default_ms": 0.041, "case": "deepseek_v3_down_16"}}}

A key names what decides the choice: a model's sizes and dtypes as they are, and sizes that vary at
run time (tokens, rows) rounded up to a power of two, so that what was measured for 16 tokens
serves 9 to 16. Each op makes it by one function, `tuning_key`, of the shapes; the sweep and the
kernel both call that. Where the caller names no tiles, a kernel's `best_tiles` asks `tuned`, and
takes its heuristic where nobody measured.
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


def up_to(n: int) -> int:
    """The power of two that a size which varies at run time is rounded up to, in a key."""
    return 1 << (n - 1).bit_length()


def fields(tiles: Any) -> dict[str, Any]:
    """What a table says of a NamedTuple of tiles. `kind`: some ops have more than one."""
    return {"kind": type(tiles).__name__, **tiles._asdict()}


def tuned[T](op: str, device: Device, key: str, *kinds: type[T]) -> T | None:
    """The tiles, of one of `kinds`, that were fastest on `device`; None where nobody measured.

    Raises ValueError for an entry that none of them fits: it is of an older kernel.
    """
    found = _measured(op, device.name).get(key)
    if found is None:
        return None
    values = dict(found["tiles"])
    name = values.pop("kind", None)
    for kind in kinds:
        if kind.__name__ == name and set(kind._fields) == set(values):  # type: ignore[attr-defined]
            return kind(**values)
    known = " or ".join(f"{k.__name__}{k._fields}" for k in kinds)  # type: ignore[attr-defined]
    raise ValueError(
        f"pallas_kernels/{op}/tuned/{device.name}.json has {found['tiles']} for {key!r}; it must "
        f"be {known}: measure again, or delete the entry"
    )


@functools.cache
def _measured(op: str, device: str) -> Mapping[str, Mapping[str, Any]]:
    file = files("pallas_kernels") / op / "tuned" / f"{device}.json"
    return json.loads(file.read_text())["tiles"] if file.is_file() else {}
