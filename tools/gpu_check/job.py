"""What a worker is asked for, how it answers, and the cases and device that it works on.

A worker writes to stdout: lines that begin with RECORD hold one JSON object each and are kept as
they come, so that a worker that dies loses only what it had not yet reported; lines that begin
with PROGRESS are shown. All else goes to the log.
"""

import importlib
import json
import math
import time
from types import ModuleType
from typing import Any, NamedTuple

from pallas_kernels.devices import DEVICES, Device, device_of_kind

RECORD, PROGRESS = "@record ", "@progress "
DRY_CASES = 1  # of each op, in a dry run


class Job(NamedTuple):
    part: str
    ops: tuple[str, ...]
    dry_run: bool
    deadline: float  # of time.monotonic()
    ceilings: dict[str, Any]  # as the part of that name measured them; empty where it did not
    started: float  # of time.monotonic(), which processes share: when this one was asked for
    artifact: str  # a folder that xlinfer.compile wrote; "" for parts that need none
    scratch: str  # a folder that the workers of a part share; "" likewise

    @property
    def left(self) -> float:
        """Seconds until what is not done should be left undone."""
        return self.deadline - time.monotonic()


def record(**fields: Any) -> None:
    print(RECORD + json.dumps(jsonable(fields), allow_nan=False), flush=True)


def progress(text: str) -> None:
    print(PROGRESS + text, flush=True)


def jsonable(value: Any) -> Any:
    """`value` with what JSON cannot hold (nan, an infinity) as text."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def why(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def device_here(dry_run: bool) -> Device:
    """The description of the device that jax found. Raises ValueError where there is none."""
    import jax

    if dry_run:
        return DEVICES["cpu"]
    # jax falls back to the CPU, where these shapes would take hours.
    if jax.default_backend() == "cpu":
        raise ValueError("jax found no accelerator; --dry_run needs none")
    return device_of_kind(jax.devices()[0].device_kind)


def cases_of(op: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.{op}.cases")


def own_impl(cases: ModuleType, case: Any, device: Device) -> str | None:
    """The implementation that is ours to check there: the kernel where one takes the case, else
    what the op leaves to XLA; None where an accelerator has the reference alone."""
    impls = cases.impls(case, device)
    ranked = sorted(impls, key=lambda impl: not impl.startswith("mosaic"))
    if device.platform == "cpu":
        return ranked[0] if ranked else None
    return next((impl for impl in ranked if impl != "reference"), None)


def comparable(cases: ModuleType, case: Any, output: Any) -> Any:
    """The arrays of `output` that implementations must agree on."""
    import jax

    agree = getattr(cases, "comparable", lambda case, output: output)
    return jax.tree.leaves(agree(case, output))
