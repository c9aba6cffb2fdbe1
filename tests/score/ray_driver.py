"""A driver of its own process: argv is the output, the input, and how long the scorer takes for a
row, in seconds; it prints each actor's process and the commits."""

import functools
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.score import fake
from xlinfer.score.job import finish, open_job, read_state
from xlinfer.score.ray_runner import RayOptions, run_on_ray
from xlinfer.score.rows import Row, Scored
from xlinfer.score.shard import Worker
from xlinfer.score.store import open_store


def make(folder: Path, pause_s: float) -> Worker:
    """Each actor leaves a file called by its process, which grows by a byte a row."""
    path = folder / f"actor-{os.getpid()}"

    def slow(rows: Iterable[Row]) -> Iterator[Scored]:
        for scored in fake.scorer(rows):
            time.sleep(pause_s)
            with path.open("a") as file:
                file.write(".")
            yield scored

    path.touch()
    return Worker(scorer=slow, device="fake", roofline_tokens_per_s=None)


def main(output: Path, source: Path, pause_s: float) -> None:
    store = open_store(str(output))
    manifest = open_job(store, fake.job_of(source), fake.quiet)
    counted = []
    run_on_ray(
        RayOptions(address=None, num_actors=2, resources={"CPU": 1}),
        store.url,
        functools.partial(make, output.parent, pause_s),
        read_state(store, manifest).todo(retry_failed=False),
        stop=threading.Event(),
        on_rows=lambda rows, failed, tokens: counted.append((rows, failed, tokens)),
        on_commit=lambda commit: print("committed", commit.rows, flush=True),
    )
    finish(store, manifest)
    print("counted", [sum(counts) for counts in zip(*counted, strict=True)], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
