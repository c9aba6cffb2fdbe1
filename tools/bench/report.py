"""How a measurement is summed up, printed and stored, with the machine that it was made on."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "xlinfer")

Result = Mapping[str, Any]  # name, unit included -> number, text, or a Result of its own


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of 100 do not exceed, between neighbours linearly (as numpy).

    Raises ValueError when there are no values or `percent` is not in [0, 100].
    """
    if not values:
        raise ValueError("percentile of no values")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in [0, 100], got {percent}")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, tails and extremes, in the values' own unit."""
    rows = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: percentile(values, percent) for name, percent in rows.items()}


def measure(call: Callable[[], object], *, repeats: int, warmups: int = 2) -> list[float]:
    """Seconds of each of `repeats` calls, after `warmups` that compile and touch memory.

    `call` must wait for its result (`jax.block_until_ready`): dispatch alone proves nothing.
    """
    for _ in range(warmups):
        call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return seconds


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use: a container's share may be smaller than the machine."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """What a number depends on besides the code: device, processor, versions."""
    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
        },
        "cpu": {"model": cpu_model(), "cores": cores()},
        "os": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def rows(result: Result, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of every leaf, in order."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from rows(value, f"{prefix}{name}.")
        else:
            yield prefix + name, number(value)


def number(value: object) -> str:
    """Four significant digits, without exponents for what a reader meets here."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value == 0 or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3e}" if value else "0"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def table(result: Result) -> str:
    """The result's leaves, a line each, numbers aligned right."""
    lines = list(rows(result))
    left = max((len(name) for name, _ in lines), default=0)
    right = max((len(text) for _, text in lines), default=0)
    return "\n".join(f"  {name:{left}}  {text:>{right}}" for name, text in lines)


def checked(result: Result) -> Result:
    """`result`, if JSON can hold it. Raises ValueError for NaN, TypeError for arrays and such."""
    json.dumps(result, allow_nan=False)
    return result


def document(command: str, results: Mapping[str, Result]) -> dict[str, Any]:
    """What is stored: the environment, the command and the results."""
    return {**environment(), "command": command, "results": results}
