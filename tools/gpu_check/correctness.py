"""Every kernel against its reference over the op's CASES, compiled for the device at hand.

Free memory is filled with nan first, so that what is read without having been written shows; and
each kernel runs several times on the same inputs: a result that changes is a race.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import Device
from tools.gpu_check import job as jobs
from tools.gpu_check.entrants import (
    Starter,
    errors,
    failed,
    inputs,
    key_of,
    maker_of,
    reference,
)
from tools.gpu_check.job import Job, comparable, progress, record, why

REPEATS = 3
POISON_BYTES = 2**28
AHEAD = 8  # cases whose programs are compiled at once


def main(job: Job) -> None:
    for op in job.ops:
        check_op(job, op)


def check_op(job: Job, op: str) -> None:
    cases, device = jobs.cases_of(op), jobs.device_here(job.dry_run)
    wanted = [(c, i) for c in cases.CASES if (i := jobs.own_impl(cases, c, device))]
    if job.dry_run:
        wanted = wanted[: jobs.DRY_CASES]
    if not wanted:
        raise ValueError(f"{op} has no case that runs as a kernel on {device.name}")
    done = passed = 0
    with ThreadPoolExecutor(2 if job.dry_run else 4) as pool:
        for at in range(0, len(wanted), AHEAD):
            some = wanted[at : at + AHEAD]
            if job.left < 0:
                record(op=op, skipped=[c.name for c, _ in wanted[at:]], why="out of time")
                progress(f"{op}: out of time, {len(wanted) - at} cases left out")
                break
            started = [
                (
                    c,
                    i,
                    _start(op, c, i, device, pool),
                    Starter(op, c, pool, job.dry_run).reference(),
                )
                for c, i in some
            ]
            for case, impl, kernel, definition in started:
                report = _check(op, case, kernel, definition)
                record(op=op, case=case.name, impl=impl, **report)
                done, passed = done + 1, passed + report["ok"]
                if not report["ok"]:
                    progress(f"{op} {case.name}: {report.get('why') or report}")
    progress(f"{op}: {passed} of {done} cases equal the reference")


def _start(op: str, case: Any, impl: str, device: Device, pool: ThreadPoolExecutor) -> tuple:
    """What makes the kernel's inputs, and the kernel."""
    try:
        lowered = jax.jit(maker_of(op, case, impl)).lower(key_of(op, case, 0))
        function = jobs.cases_of(op).call(case, impl, device)
        kernel = jax.jit(function).lower(*lowered.out_info)
        return pool.submit(lowered.compile), pool.submit(kernel.compile)
    except Exception as error:
        return failed(error), failed(error)


def _check(op: str, case: Any, started: tuple, definition: tuple) -> dict[str, Any]:
    cases = jobs.cases_of(op)
    try:
        maker, kernel = (future.result() for future in started)
        args, want = inputs(maker, op, case, 0), reference(op, case, definition)
        found = []
        for _ in range(REPEATS):
            jnp.full(POISON_BYTES // 4, jnp.nan, jnp.float32).block_until_ready().delete()
            found.append(comparable(cases, case, kernel(*args)))
        report = max((errors(got, want) for got in found), key=_worst)
        same = all(
            bool((a == b).all()) for got in found for a, b in zip(got, found[0], strict=True)
        )
        report |= {"repeatable": same, "ok": report["of_tolerance"] <= 1 and same}
        return report if same else {**report, "why": "the result changes from run to run"}
    except Exception as error:
        return {"ok": False, "why": why(error)}


def _worst(report: dict[str, float]) -> float:
    return report["of_tolerance"] if report["of_tolerance"] == report["of_tolerance"] else 1e30
