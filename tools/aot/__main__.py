"""`./run aot`: compile every kernel for H100, H200, v5e, v5p, v6e and tpu7x, and check the results.

For each op, case and device, in a process of its own: it compiles, no register is spilled (ptxas)
and VMEM is enough (the TPU compiler refuses otherwise), no dequantised copy of the weights is
among the temporaries, and a TPU kernel's cost estimate is the work that the case needs. The
engine's own programs for Llama 3 8B hold kernels, alias their cache and copy no weights; the
model's own forward holds kernels and no square of logits. What writes a checkpoint's tensors into
the parameters aliases these, and holds less than a layer beside them. What devices of a slice
exchange is what is planned.
"""

import argparse
import importlib
import json
import os
import re
import site
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.cases import OPS
from pallas_kernels.devices import DEVICES, GPUS, TPUS
from tools.aot.collectives import CASES
from tools.aot.load import KINDS
from tools.aot.programs import PROGRAMS

COMPILERS = Path(sys.prefix) / "compilers"  # where ./run puts them
ENGINE = "engine"  # not an op: its programs for Llama 3 8B, tools/aot/programs.py
LOAD = "load"  # its checkpoint into the parameters, tools/aot/load.py
COLLECTIVES = "collectives"  # nor is this: what devices of a slice exchange, collectives.py
TIMEOUT_S = 300
# A kernel's estimate may count whole tiles where the work counts what is used of them, and
# quantizing the activations where the work counts the product alone.
FLOPS_RATIO = (0.9, 2.0)
BYTES_RATIO = (0.8, 2.5)


class Job(NamedTuple):
    op: str
    case: str
    impl: str
    device: str


class Outcome(NamedTuple):
    job: Job
    report: dict[str, Any]
    faults: list[str]


def jobs(ops: Sequence[str], devices: Sequence[str], case: str | None, fast: bool) -> list[Job]:
    """Every case of a published model on every device; `fast`: the first case of each op, on one
    GPU and one TPU."""
    devices = ("h200", "v6e") if fast else devices
    found = []
    for op in ops:
        if op == ENGINE:
            some = PROGRAMS[:1] if fast else PROGRAMS
            found += [
                Job(ENGINE, f"{program}_{bucket}", quantization, device)
                for device in devices
                for program, bucket, quantization in some
                if case in (None, f"{program}_{bucket}")
            ]
            continue
        if op == LOAD:
            some = list(KINDS)[:1] if fast else list(KINDS)
            found += [Job(LOAD, k, "xla", d) for d in devices for k in some if case in (None, k)]
            continue
        if op == COLLECTIVES:
            chosen = list(CASES)[:1] if fast else CASES
            slices = [(name, CASES[name].target.partition("-")[0]) for name in chosen]
            found += [
                Job(COLLECTIVES, name, "-", device)
                for name, device in slices
                if device in devices and case in (None, name)
            ]
            continue
        cases = importlib.import_module(f"pallas_kernels.{op}.cases")
        for name in devices:
            device = DEVICES[name]
            chosen = [c for c in cases.MODEL_CASES if cases.impls(c, device)]
            if case is not None:
                chosen = [c for c in chosen if c.name == case]
            for c in chosen[:1] if fast else chosen:
                # cuDNN is a library that must be there, not a kernel of ours.
                ours = [impl for impl in cases.impls(c, device) if impl != "cudnn"]
                found += [Job(op, c.name, impl, name) for impl in ours]
    return found


def run(job: Job) -> Outcome:
    """Compile in a process of its own and judge what came of it."""
    places = [str(COMPILERS), *site.getsitepackages()]
    environment = os.environ | {
        "PYTHONPATH": str(COMPILERS),
        # The CUDA packages' own ptxas: one of the system may be older than jax.
        "PATH": os.pathsep.join([*(f"{p}/nvidia/cu13/bin" for p in places), os.environ["PATH"]]),
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    if job.op == ENGINE:
        program, _, bucket = job.case.partition("_")
        command = ["tools.aot.programs", program, bucket, job.impl, job.device]
    elif job.op == LOAD:
        command = ["tools.aot.load", job.case, job.device]
    elif job.op == COLLECTIVES:
        command = ["tools.aot.collectives", job.case]
    else:
        command = ["tools.aot.one", *job]
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return Outcome(job, {}, [f"not compiled after {TIMEOUT_S} s"])
    output = done.stdout + done.stderr
    if done.returncode != 0:
        reason = [line for line in output.splitlines() if line.strip()] or ["no output"]
        return Outcome(job, {"output": output}, [f"exit {done.returncode}: {reason[-1][:200]}"])
    report = json.loads(done.stdout.splitlines()[-1])
    report |= {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", output)), default=None),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", output))),
    }
    return Outcome(job, report, faults(job, report))


def faults(job: Job, report: dict[str, Any]) -> list[str]:
    """One sentence for each thing in `report` that must not be."""
    found = []
    if report["spilled"]:
        found.append(f"{report['spilled']} bytes of registers spilled")
    if job.op in (ENGINE, LOAD) and report["temp_bytes"] > report["most_temp_bytes"]:
        found.append(
            f"{report['temp_bytes']} bytes of temporaries, at most {report['most_temp_bytes']}"
        )
    if job.op == LOAD:
        if report["copied_bytes"]:
            found.append(f"{report['copied_bytes']} bytes of a parameter are copied at every write")
        return found
    if job.op == COLLECTIVES:
        if report["planned"] != report["found"]:
            found.append(f"planned {report['planned']}, but XLA made {report['found']}")
        return found
    if job.op == ENGINE:
        if report["kernels"] == 0:
            found.append("no Pallas kernel is in it")
        if report["alias_bytes"] < report["cache_bytes"]:
            found.append(f"{report['alias_bytes']} bytes aliased: the cache is copied")
        if report["unwanted"]:
            found.append(f"XLA made {len(report['unwanted'])} such: {report['unwanted'][0]}")
        return found
    work = report["work"]
    if job.impl == "mosaic_gpu" and report["registers"] is None:
        found.append("ptxas reported nothing: no kernel was compiled")
    if work["forbidden_bytes"] is not None and report["temp_bytes"] >= work["forbidden_bytes"]:
        found.append(
            f"{report['temp_bytes']} bytes of temporaries: enough for a copy of the weights"
            f" ({work['forbidden_bytes']})"
        )
    if job.impl == "mosaic_tpu":
        needed = work | {"flops": work["most_flops"] or work["flops"]}
        for name, (low, high) in (("flops", FLOPS_RATIO), ("bytes", BYTES_RATIO)):
            ratio = (report[name] or 0) / needed[name]
            if not low <= ratio <= high:
                found.append(f"its estimate has {ratio:.2f} of the {name}, not {low} to {high}")
    return found


HEADER = f"{'op':16}{'case':28}{'impl':11}{'device':7}{'s':>5}{'regs':>5}{'temp MiB':>9}  result"


def row(outcome: Outcome) -> str:
    job, report = outcome.job, outcome.report
    temp = f"{report['temp_bytes'] / 2**20:.1f}" if "temp_bytes" in report else "-"
    registers = report.get("registers") or "-"
    seconds = f"{report['seconds']:.1f}" if "seconds" in report else "-"
    result = "; ".join(outcome.faults) or "ok"
    return (
        f"{job.op:16}{job.case:28}{job.impl:11}{job.device:7}{seconds:>5}{registers:>5}{temp:>9}"
        f"  {result}"
    )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    names = [d.name for d in (*GPUS, *TPUS)]
    parser = argparse.ArgumentParser(
        prog="./run aot", description="Compile the kernels for devices that are not here."
    )
    parser.add_argument(
        "--op",
        action="append",
        choices=(*OPS, ENGINE, LOAD, COLLECTIVES),
        help="only this; repeatable",
    )
    parser.add_argument("--device", action="append", choices=names, help="only for this device")
    parser.add_argument("--case", help="only the case of this name")
    parser.add_argument("--fast", action="store_true", help="one case of each op, h200 and v6e")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the reports here")
    parser.add_argument("--verbose", action="store_true", help="print a failed compile's output")
    args = parser.parse_args(argv)
    every = [*OPS, ENGINE, LOAD, COLLECTIVES]
    args.op, args.device = args.op or every, args.device or names
    return args


def main(argv: Sequence[str]) -> int:
    """Compile all, print a row for each; 1 if any has a fault or there was nothing to compile."""
    args = arguments(argv)
    work = jobs(args.op, args.device, args.case, args.fast)
    if not work:
        print("no case fits these arguments")
        return 1
    started, outcomes = time.monotonic(), []
    print(HEADER)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for outcome in pool.map(run, work):
            outcomes.append(outcome)
            print(row(outcome), flush=True)
            if args.verbose and "output" in outcome.report:
                print(outcome.report["output"])
    failed = sum(bool(outcome.faults) for outcome in outcomes)
    print(f"{len(outcomes)} compiles, {failed} with faults, {time.monotonic() - started:.0f} s")
    if args.json is not None:
        rows = [o.job._asdict() | o.report | {"faults": o.faults} for o in outcomes]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
