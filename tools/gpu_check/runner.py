"""Runs workers, each for a part and some ops in a process of its own, and keeps what they report.

A worker that crashes or hangs costs what it had not yet reported: it is killed, with everything
it started, when its time is up.
"""

import contextlib
import json
import os
import signal
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu_check.job import PROGRESS, RECORD

ROOT = Path(__file__).parents[2]
GRACE_S = 8.0  # between the time that a worker is told and the time that it is killed


class Task(NamedTuple):
    """For one worker: Job's fields, as JSON holds them, but when it was started."""

    part: str
    ops: tuple[str, ...]
    seconds: float
    dry_run: bool
    ceilings: Mapping[str, Any]
    artifact: str = ""
    scratch: str = ""


class Results:
    """The document, on disk after every change. Thread-safe."""

    def __init__(self, path: Path, head: Mapping[str, Any]):
        self.path = path
        self.document: dict[str, Any] = {**head, "workers": [], "records": []}
        self._lock = threading.Lock()
        self.write()

    def add(self, kind: str, entry: Mapping[str, Any]) -> None:
        with self._lock:
            self.document[kind].append(dict(entry))
            self._write()

    def set(self, **entries: Any) -> None:
        with self._lock:
            self.document |= entries
            self._write()

    def write(self) -> None:
        with self._lock:
            self._write()

    def _write(self) -> None:
        beside = self.path.with_suffix(".partial")
        beside.write_text(json.dumps(self.document, indent=1) + "\n")
        beside.replace(self.path)

    def of(self, part: str) -> list[dict[str, Any]]:
        return [r for r in self.document["records"] if r["part"] == part]


class Runner:
    """Starts workers; `stop` ends those that run."""

    def __init__(self, results: Results, log: Path, say: Callable[[str], None]):
        self._results, self._log, self._say = results, log, say
        self._running: set[subprocess.Popen] = set()
        self._stopped = False
        log.write_text("")

    def run(self, task: Task) -> bool:
        """Wait for one worker; whether it ended well."""
        if self._stopped:
            return False
        started = time.monotonic()
        job = {
            "ops": task.ops, "seconds": task.seconds, "dry_run": task.dry_run,
            "ceilings": task.ceilings, "started": started,
            "artifact": task.artifact, "scratch": task.scratch,
        }  # fmt: skip
        command = [sys.executable, "-m", "tools.gpu_check.worker", task.part, json.dumps(job)]
        log_start = self._log.stat().st_size
        with self._log.open("a") as log:
            log.write(f"== {task.part} {' '.join(task.ops)}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(task), text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=log, process_group=0,
            )  # fmt: skip
            self._running.add(process)
            late = threading.Timer(task.seconds + GRACE_S, kill, (process,))
            late.start()
            with process:
                try:
                    self._listen(process, task, log)
                    code = process.wait()
                finally:
                    late.cancel()
                    kill(process)
                    self._running.discard(process)
        seconds = time.monotonic() - started
        # An orderly end may come just before the timer's.
        hung = code != 0 and seconds >= task.seconds + GRACE_S
        status = "ok" if code == 0 else "killed: out of time" if hung else f"exit {code}"
        entry = {"part": task.part, "ops": task.ops, "seconds": round(seconds, 1), "status": status}
        if code != 0:
            entry["log"] = last_lines(self._log, log_start)
            last = entry["log"][-1] if entry["log"] else "no output"
            self._say(f"{task.part} {' '.join(task.ops)}: {status}: {last[:200]}")
        self._results.add("workers", entry)
        return code == 0

    def stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            kill(process)

    def _listen(self, process: subprocess.Popen, task: Task, log: Any) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(RECORD):
                with contextlib.suppress(ValueError):  # cut off by the worker's end
                    entry = json.loads(line.removeprefix(RECORD))
                    self._results.add("records", {"part": task.part, **entry})
            elif line.startswith(PROGRESS):
                self._say(f"{task.part} {line.removeprefix(PROGRESS).rstrip()}")
            else:
                log.write(line)
                log.flush()


def kill(process: subprocess.Popen) -> None:
    """The worker and everything it started: they are one process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def environment(task: Task) -> dict[str, str]:
    torch = task.part == "torch_timing"
    # The CUDA packages' own ptxas before the system's, which may be older than jax.
    tools = [f"{p}/nvidia/cu13/bin" for p in (*site.getsitepackages(), *sys.path)]
    tools = list(dict.fromkeys(t for t in tools if Path(t).is_dir()))
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if task.dry_run else {}
    return (
        os.environ
        | quickly
        | {
            "JAX_PLATFORMS": "cpu" if task.dry_run or torch else "cuda",
            # Several processes share the device's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PATH": os.pathsep.join([*tools, os.environ.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "JAX_TRACEBACK_FILTERING": "off",  # filtered ones end with a note about the filter
        }
    )


def last_lines(log: Path, start: int, count: int = 25) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-count:]


def shares(part_shares: Mapping[str, float], budget_s: float) -> Iterator[tuple[str, float]]:
    """Each part and the second, from now, by which it should have ended. What a part leaves over
    goes to those that follow."""
    total, at = sum(part_shares.values()), 0.0
    for part, share in part_shares.items():
        at += budget_s * share / total
        yield part, at
