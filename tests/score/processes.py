"""Runs a job in processes that are killed or stopped at given steps: argv is the output, the input
and the stages as JSON. Those of a stage run at once, and one that is stopped wakes at the end.

A process of its own, without jax: it forks.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.score import fake
from xlinfer.score import rowlog
from xlinfer.score.job import finish, open_job, read_state, run_attempts
from xlinfer.score.rows import Row, Scored
from xlinfer.score.shard import ShardRunner, Worker
from xlinfer.score.store import LocalStore

rowlog.POLL_S = 0.001


class Store(LocalStore):
    sync_interval_s = 0.002


def slow(rows: Iterable[Row]) -> Iterator[Scored]:
    for scored in fake.scorer(rows):
        time.sleep(0.0005)
        yield scored


def drive(output: Path, source: Path, step_name: str, count: int, signal_name: str) -> None:
    """As a driver does, but `signal_name` comes at the `count`-th time of `step_name`."""
    left = count

    def step(name: str) -> None:
        nonlocal left
        if name == step_name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), getattr(signal, signal_name))

    store = Store(output)
    step("begin")
    manifest = open_job(store, fake.job_of(source), fake.quiet)
    step("planned")
    state = read_state(store, manifest)
    worker = Worker(scorer=slow, device="fake", roofline_tokens_per_s=None)
    runner = ShardRunner(store=store, manifest=manifest, worker=worker, step=step)
    run_attempts(runner, state.todo(retry_failed=False), lambda commit: None)
    step("ran")
    finish(store, manifest)
    step("finished")


def main(output: Path, source: Path, stages: list[list[list]]) -> None:
    stopped = []
    try:
        play(output, source, stages, stopped)
    finally:
        for child in stopped:  # where something failed before they were woken
            os.kill(child, signal.SIGKILL)


def play(output: Path, source: Path, stages: list[list[list]], stopped: list[int]) -> None:
    for stage in stages:
        started = []
        for arguments in stage:
            child = os.fork()
            if not child:
                code = 1
                try:
                    drive(output, source, *arguments)
                    code = 0
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            started.append(child)
        for child in started:
            _, status = os.waitpid(child, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                stopped.append(child)
            else:
                check(status)
    while stopped:
        os.kill(stopped[-1], signal.SIGCONT)
        check(os.waitpid(stopped.pop(), 0)[1])


def check(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"a driver ended with {code}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
