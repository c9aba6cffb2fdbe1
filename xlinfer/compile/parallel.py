"""Programs of one setup, compiled in processes side by side.

Each process builds the deployment once, of abstract arrays, and then compiles whatever program is
next. One that dies takes its program with it, and another process goes on with the rest.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryFile
from typing import Any, NamedTuple

from xlinfer.compile import Key, title
from xlinfer.progress import Progress

WORKER = "xlinfer.commands.worker"


class CompileError(RuntimeError):
    """A program that XLA did not compile."""


class Compiled(NamedTuple):
    digest: str  # in the store
    hit: bool  # it was there before
    seconds: float


def compile_in_parallel(
    setup: Mapping[str, Any],
    keys: Sequence[Key],
    directory: Path,
    *,
    processes: int,
    cpu_devices: int,
    progress: Progress | None,
) -> dict[Key, Compiled]:
    """Have every program of `keys` in the store at `directory`. Raises CompileError with what the
    compiler said of the first that failed; those that were done stay done."""
    waiting: SimpleQueue[Key] = SimpleQueue()
    for key in keys:
        waiting.put(key)
    done: dict[Key, Compiled] = {}
    if progress:
        progress("compile", 0, len(keys))

    def work() -> None:
        worker = _Worker(setup, directory, cpu_devices)
        try:
            while True:
                try:
                    key = waiting.get_nowait()
                except Empty:
                    return
                done[key] = worker.compile(key)
                if progress:
                    progress("compile", len(done), len(keys))
        except BaseException:
            while not waiting.empty():  # nobody starts another
                waiting.get_nowait()
            raise
        finally:
            worker.end()

    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(work) for _ in range(min(processes, len(keys)))]:
            future.result()
    return done


class _Worker:
    def __init__(self, setup: Mapping[str, Any], directory: Path, cpu_devices: int):
        self._errors = TemporaryFile("w+")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "xlinfer.commands.worker",
                str(directory),
                str(cpu_devices),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(),
        )
        self._send(setup)

    def compile(self, key: Key) -> Compiled:
        self._send(key)
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith('{"program"'):
                report = json.loads(line)
                return Compiled(report["digest"], report["hit"], report["seconds"])
        self._process.wait()
        self._errors.seek(0)
        said = [x.strip() for x in self._errors if x.strip()]
        errors = [x for x in said if "Error" in x] or said or ["it said nothing"]
        raise CompileError(f"program {title(key)} was not compiled: {errors[-1][:600]}")

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; reading says why

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):  # of a line that was not read any more
                file.close()  # type: ignore[union-attr]


def environment() -> dict[str, str]:
    """Of a process that compiles and runs nothing on a device."""
    # The CUDA packages' own ptxas: one of the system may be older than jax.
    tools = [p for path in sys.path if (p := Path(path) / "nvidia/cu13/bin").is_dir()]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PATH": os.pathsep.join([*map(str, tools), os.environ.get("PATH", "")]),
    }
