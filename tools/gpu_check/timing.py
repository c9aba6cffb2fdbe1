"""Every kernel's device time at the shapes of published models, beside the best alternative.

All programs of a few cases are compiled first and then timed, nothing else running: XLA's own
choice between its kernels is made by timing them while it compiles.
"""

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from pallas_kernels.devices import Device
from tools.gpu_check import job as jobs
from tools.gpu_check.alternatives import alternatives
from tools.gpu_check.entrants import Starter, measure, own, passes, reference
from tools.gpu_check.job import Job, progress, record
from tools.gpu_check.targets import first_of, values

AT_FIRST, AT_ONCE = 2, 4  # cases


def main(job: Job) -> None:
    for op in job.ops:
        time_op(job, op)


def time_op(job: Job, op: str) -> None:
    cases, device = jobs.cases_of(op), jobs.device_here(job.dry_run)
    found = cases.CASES if job.dry_run else first_of(op, cases.MODEL_CASES, cases.work)
    wanted = [c for c in found if jobs.own_impl(cases, c, device)]
    if job.dry_run:
        wanted = wanted[: jobs.DRY_CASES]
    if not wanted:
        raise ValueError(f"{op} has no case that runs as a kernel on {device.name}")
    longest = 0.0  # seconds that a wave took
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        at = 0
        while at < len(wanted):
            if job.left < longest:
                record(op=op, skipped=[c.name for c in wanted[at:]], why="out of time")
                progress(f"{op}: out of time, {len(wanted) - at} cases left out")
                return
            started = time.monotonic()
            # The first are few, so that slow compilers do not cost all.
            some = wanted[at : at + (AT_ONCE if at else AT_FIRST)]
            wave = [(c, *_start(op, c, device, pool, job.dry_run)) for c in some]
            for _, definition, entrants in wave:
                wait([*definition, *(f for e in entrants for f in (e.maker, e.program))])
            for case, definition, entrants in wave:
                _time_case(job, op, case, definition, entrants)
            at, longest = at + len(some), max(longest, time.monotonic() - started)


def _start(op: str, case: Any, device: Device, pool: ThreadPoolExecutor, dry_run: bool) -> tuple:
    cases = jobs.cases_of(op)
    impl = jobs.own_impl(cases, case, device)
    assert impl is not None
    others = [i for i in cases.impls(case, device) if i not in (impl, "reference")]
    entrants = [own(op, case, i, device) for i in (impl, *others)]
    entrants += alternatives(op, case, device)
    starter = Starter(op, case, pool, dry_run)
    return starter.reference(), [starter.entrant(e) for e in entrants]


def _time_case(job: Job, op: str, case: Any, definition: tuple, entrants: list) -> None:
    cases = jobs.cases_of(op)
    try:
        want = reference(op, case, definition)
    except Exception as error:
        want = None
        record(op=op, case=case.name, failed="reference", why=jobs.why(error))
    seconds = 0.01 if job.dry_run else 0.15
    first, *others = [measure(op, case, e, want, seconds) for e in entrants]
    yardsticks = {e.entrant.name for e in entrants if not e.entrant.same}
    for report in (first, *others):
        if "of_tolerance" in report:
            report["ok"] = passes(report, ours=report is first)
        report["yardstick"] = report["name"] in yardsticks
    work = cases.work(case)
    report = {
        "ours": first, "others": others, "flops": work.flops, "bytes": work.bytes,
        **bound(work, job.ceilings, eight_bit(op, case)),
    }  # fmt: skip
    if "ms" in first and report["ceiling_ms"]:
        report["of_ceiling"] = report["ceiling_ms"] / first["ms"]
    report["targets"] = values(op, case, work, report, job.ceilings)
    record(op=op, case=case.name, impl=first["name"], **report)
    right = {r["name"]: r["ms"] for r in others if "ms" in r and r.get("ok")}
    best = min(right.items(), key=lambda item: item[1], default=("nothing else ran", 0.0))
    said = f"{first['ms']:.4f} ms" if "ms" in first else first["why"]
    progress(f"{op} {case.name}: {said}; {best[0]} {best[1]:.4f}")


def eight_bit(op: str, case: Any) -> bool:
    """Whether both operands of its products have 8 bits: they run at twice the bf16 rate."""
    return (
        (op == "fp8_matmul" and case.activations == "e4m3")
        or (op == "int8_matmul" and case.activations == "int8")
        or (op == "grouped_matmul" and case.weights.startswith("fp8"))
    )


def bound(work: Any, ceilings: Mapping[str, float], eight_bit: bool) -> dict[str, Any]:
    """The time that this run's ceilings allow, and which of the two allows no less."""
    copy, rate = (ceilings.get(name) for name in ("copy_GB_per_s", "bf16_TFLOP_per_s"))
    if not copy or not rate:
        return {"bound": None, "ceiling_ms": None}
    memory = work.bytes / copy / 1e6
    arithmetic = work.flops / (rate * (2 if eight_bit else 1)) / 1e9
    kind = "memory" if memory >= arithmetic else "compute"
    return {"bound": kind, "ceiling_ms": max(memory, arithmetic)}
