"""A sweep of tile choices at the shapes of published models; the best is what tuning.py of
pallas_kernels reads. A choice counts only if its result is the reference's.
"""

import inspect
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from pallas_kernels import tuning
from pallas_kernels.devices import Device
from tools.gpu_check import job as jobs
from tools.gpu_check.entrants import Starter, measure, own, passes, reference
from tools.gpu_check.job import Job, progress, record
from tools.gpu_check.targets import first_of

CHOICES = 12  # of a case, the first that the op lists: it lists the most promising first
CLEARLY = 0.98  # a choice must take less than this of the default's time to replace it


def main(job: Job) -> None:
    for op in job.ops:
        tune_op(job, op)


def tune_op(job: Job, op: str) -> None:
    cases, device = jobs.cases_of(op), jobs.device_here(job.dry_run)
    found = cases.CASES if job.dry_run else first_of(op, cases.MODEL_CASES, cases.work)
    wanted = [c for c in found if jobs.own_impl(cases, c, device)]
    missing = untunable(cases)
    if missing and not job.dry_run:
        record(op=op, untunable=missing)
        progress(f"{op}: not tuned: {missing}")
        return
    if job.dry_run:
        wanted = wanted[:1]
    longest = 0.0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for at, case in enumerate(wanted):
            if job.left < longest:
                record(op=op, skipped=[c.name for c in wanted[at:]], why="out of time")
                progress(f"{op}: out of time, {len(wanted) - at} cases left out")
                return
            started = time.monotonic()
            choices = [] if missing else choices_of(cases, case, device)
            # A CPU has no tiles to choose from: the dry run compares the default with itself.
            if choices or job.dry_run:
                _tune(job, op, case, device, choices or [None], pool)
            longest = max(longest, time.monotonic() - started)


def untunable(cases: Any) -> str:
    """What the op lacks of pallas_kernels/cases.py to be tuned; empty where nothing."""
    if not hasattr(cases, "candidates"):
        return "its cases.py has no candidates"
    if not hasattr(cases, "tuning_key"):
        return "its cases.py has no tuning_key"
    if "tiles" not in inspect.signature(cases.call).parameters:
        return "call in its cases.py takes no tiles"
    return ""


def choices_of(cases: Any, case: Any, device: Device) -> list[Any]:
    return list(cases.candidates(case, device))[:CHOICES]


def _tune(
    job: Job, op: str, case: Any, device: Device, choices: list, pool: ThreadPoolExecutor
) -> None:
    cases = jobs.cases_of(op)
    impl = jobs.own_impl(cases, case, device)
    assert impl is not None
    starter = Starter(op, case, pool, job.dry_run)
    definition = starter.reference()
    trials = [own(op, case, impl, device), *(own(op, case, impl, device, t) for t in choices)]
    compiling = [starter.entrant(trial) for trial in trials]
    # Nothing compiles while the clock runs.
    wait([*definition, *(f for c in compiling for f in (c.maker, c.program))])
    try:
        want = reference(op, case, definition)
    except Exception as error:
        record(op=op, case=case.name, failed="reference", why=jobs.why(error))
        return
    seconds = 0.01 if job.dry_run else 0.05
    reports = [measure(op, case, c, want, seconds) for c in compiling]
    fields = [None, *(tuning.fields(t) if t is not None else {} for t in choices)]
    sweep = [
        {"tiles": tiles, **report, "ok": "ms" in report and passes(report, ours=True)}
        for tiles, report in zip(fields, reports, strict=True)
    ]
    right = [trial for trial in sweep if trial["ok"]]
    default = sweep[0].get("ms")
    best = min(right, key=lambda trial: trial["ms"], default=None)
    if best is not None and default is not None and best["ms"] > CLEARLY * default:
        best = sweep[0] if sweep[0]["ok"] else best
    name = cases.tuning_key(case, device)
    record(
        op=op, case=case.name, key=name, impl=impl, default_ms=default, sweep=sweep,
        tiles=best and best["tiles"], ms=best and best["ms"],
    )  # fmt: skip
    failed = len(sweep) - len(right)
    said = f"{best['ms']:.4f} ms with {best['tiles'] or 'its own tiles'}" if best else "none right"
    progress(f"{op} {case.name}: {said}; {failed} of {len(sweep)} failed")
