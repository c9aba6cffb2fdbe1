"""`tools/gpu_check.sh`: check every kernel on the GPU at hand, time it, time the engine, tune.

The parts, in order: ceilings of the machine; correctness of every kernel in the compiled path;
timing at the shapes of published models, beside the alternatives; torch's alternatives; the engine
on an 8 B Llama; an artifact compiled elsewhere, against programs compiled here; and, in the time
that is left, a sweep of tile choices. Results are written as they come to OUTPUT/gpu_check.json,
and tile choices to pallas_kernels/<op>/tuned.
"""

import argparse
import datetime
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pallas_kernels.cases import OPS
from tools.gpu_check import starts, summary
from tools.gpu_check.runner import ROOT, Results, Runner, Task, shares
from tools.gpu_check.targets import verdicts

PARTS = {  # and their shares of the time
    "ceilings": 6,
    "correctness": 15,
    "timing": 34,
    "torch_timing": 6,
    "engine": 28,
    "artifact": 30,
    "tuning": 11,
}
ENGINES = ("bf16", "w4a16", "fp8")
# With other options of XLA's compiler (engine.py); run when named.
TRIALS = ("bf16_one_graph", "bf16_stored_graphs", "bf16_no_graphs", "bf16_autotuned")
LEAST_S = 5  # a worker is not started for less


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    parser.add_argument("--op", action="append", choices=OPS, help="only this; repeatable")
    parser.add_argument(
        "--engine", action="append", choices=ENGINES + TRIALS, help="only this; repeatable"
    )
    parser.add_argument("--budget_s", type=float, default=540.0, help="seconds in all")
    parser.add_argument(
        "--dry_run", action="store_true", help="on CPU: the same paths, references, tiny shapes"
    )
    parser.add_argument(
        "--artifact", type=Path, metavar="DIR",
        help="start from these programs too; without it that part is skipped. On any machine:\n"
        f"{starts.compile_command()}\nOnly you may be able to write to DIR: chmod -R go-w DIR.",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="folder for the results; $OUT where set, else docs/benchmarks"
    )
    parser.add_argument(
        "--install_tuned", type=Path, metavar="JSON",
        help="only write the tile choices of these results to pallas_kernels/<op>/tuned",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.budget_s <= 0:
        parser.error(f"--budget_s={args.budget_s}: it must be positive")
    if args.dry_run and args.artifact is not None:
        parser.error("--artifact: a dry run compiles its own")
    args.part = [p for p in PARTS if not args.part or p in args.part]
    args.op = [op for op in OPS if not args.op or op in args.op]
    args.engine = args.engine or list(ENGINES)
    args.output = args.output or Path(os.environ.get("OUT") or ROOT / "docs" / "benchmarks")
    return args


def main(argv: Sequence[str]) -> int:
    """0 where every worker ended well and every result is right; targets decide nothing here."""
    args = arguments(argv)
    if args.install_tuned is not None:
        for path in install_tuned(json.loads(args.install_tuned.read_text())):
            print(path)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    name = "gpu_check_dry_run" if args.dry_run else "gpu_check"
    started = time.monotonic()
    say = lambda text: print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)
    results = Results(
        args.output / f"{name}.json",
        {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": ["tools/gpu_check.sh", *argv],
            "dry_run": args.dry_run,
        },
    )
    runner = Runner(results, args.output / f"{name}.log", say)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the table is still printed
    if "artifact" in args.part and args.artifact is None and not args.dry_run:
        args.part.remove("artifact")
        results.set(no_artifact=starts.compile_command())
        say(f"the artifact part is skipped: give --artifact=DIR, after {starts.compile_command()}")
    try:
        for part, end in shares({p: PARTS[p] for p in args.part}, args.budget_s):
            if part == "artifact":
                run_starts(args, results, runner, started + end)
            else:
                run_part(part, args, results, runner, started + end)
            if part == "ceilings" and not any("machine" in r for r in results.of(part)):
                say("jax found no device to measure; the log says why. --dry_run needs none.")
                break
    except (KeyboardInterrupt, SystemExit):
        say("stopped")
        results.set(stopped=True)
    finally:
        runner.stop()
        records = results.document["records"]
        results.set(targets=verdicts([r for r in records if r["part"] == "timing"]))
        results.set(tuned=tuned_tables(results), seconds=round(time.monotonic() - started, 1))
        if not args.dry_run:
            install_tuned(results.document)
        print(summary.text(results.document))
        print(f"results: {results.path}")
    return int(results.document.get("stopped", False) or summary.faults(results.document) > 0)


def run_part(part: str, args: Any, results: Results, runner: Runner, end: float) -> None:
    ops = {"ceilings": ["-"], "engine": args.engine}.get(part, args.op)
    ceilings = next(
        (r["ceilings"] for r in reversed(results.of("ceilings")) if "ceilings" in r), {}
    )
    left = lambda: end - time.monotonic()

    def run(names: Sequence[str], seconds: float) -> bool:
        if seconds < LEAST_S:
            entry = {"part": part, "ops": list(names), "seconds": 0.0, "status": "out of time"}
            results.add("workers", entry)
            return False
        return runner.run(Task(part, tuple(names), seconds, args.dry_run, ceilings))

    if part == "correctness":  # nothing is timed, so all ops share the device
        with ThreadPoolExecutor(max(2, min(len(ops), (os.cpu_count() or 1) // 2))) as pool:
            list(pool.map(lambda op: run([op], left()), ops))
    elif part == "torch_timing":
        # One process, for torch takes long to start; those left by a crash get another. Attention
        # comes last: FlashInfer may compile for minutes.
        ops = ops[::-1]
        while ops:
            if run(ops, left()):
                break
            begun = {r["op"] for r in results.of(part) if "op" in r}
            ops = [op for op in ops if op not in begun] if begun & set(ops) else []
    else:
        for i, op in enumerate(ops):
            # A worker may take half as much again as its part of what is left; an engine all: half
            # of three measures nothing.
            fair = left() if part == "engine" else 1.5 * left() / (len(ops) - i)
            run([op], min(left(), fair))


def run_starts(args: Any, results: Results, runner: Runner, end: float) -> None:
    """Each in a process of its own; then whether they answered alike."""
    left = lambda: end - time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as scratch:
        artifact = str(Path(scratch) / "artifact" if args.dry_run else args.artifact.absolute())
        for name in ("compile", *starts.STARTS) if args.dry_run else starts.STARTS:
            # What a start that compiles all leaves may be too little; the third is no loss.
            taken = [w["seconds"] for w in results.document["workers"] if w["part"] == "artifact"]
            if left() < (1.5 * min(taken, default=LEAST_S) if name == "cached" else LEAST_S):
                note = {"part": "artifact", "ops": [name], "seconds": 0.0, "status": "out of time"}
                kind = "records" if name == "cached" else "workers"
                results.add(kind, note)
                continue
            seconds = left() / 2 if name == "artifact" else left()  # what hangs leaves half
            task = Task("artifact", (name,), seconds, args.dry_run, {}, artifact, scratch)
            if runner.run(task):
                continue
            if name == "compile":
                return
            if name == "uncached" and left() > LEAST_S:
                # Perhaps because programs could not be kept for the third: without, then.
                runner.run(task._replace(seconds=left(), scratch=""))
    for found in starts.comparisons(results.of("artifact")):
        results.add("records", {"part": "artifact", **found})


def tuned_tables(results: Results) -> dict[str, Any]:
    """What tuning.py of pallas_kernels reads, by op."""
    facts = next((r for r in results.of("ceilings") if "machine" in r), None)
    tables: dict[str, Any] = {}
    for r in results.of("tuning"):
        # Where the kernel's own choice was the best there is nothing to override.
        if facts is None or not r.get("tiles"):
            continue
        table = tables.setdefault(r["op"], {
            "op": r["op"], "device": facts["device"], "date": results.document["date"],
            "versions": facts["machine"]["packages"], "tiles": {},
        })  # fmt: skip
        fields = ("tiles", "ms", "default_ms", "case")
        table["tiles"][r["key"]] = {field: r[field] for field in fields}
    return tables


def install_tuned(document: dict[str, Any]) -> list[Path]:
    """Add the choices of these results to the ops' tables; the files that it wrote."""
    written = []
    for op, table in document.get("tuned", {}).items():
        path = ROOT / "pallas_kernels" / op / "tuned" / f"{table['device']}.json"
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            table = table | {"tiles": json.loads(path.read_text())["tiles"] | table["tiles"]}
        path.write_text(json.dumps(table, indent=1) + "\n")
        written.append(path)
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
