"""What a batch job costs besides its engine: rows read, logged, committed, and memory.

The scorer answers at once. Each size is a process of its own, whose peak memory is the job's:
planning with a check of ids for doubles, then shards, on one JSON-lines file.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from xlinfer.score.inputs import find_inputs
from xlinfer.score.job import finish, open_job, read_state, run_attempts
from xlinfer.score.manifest import Job
from xlinfer.score.rows import Row, Scored
from xlinfer.score.shard import ShardRunner, Worker
from xlinfer.score.store import LocalStore

SIZES = (10_000, 100_000, 1_000_000)
CONTEXT = "The quick brown fox jumps over the lazy dog. " * 4


def main() -> dict:
    results = {}
    for rows in SIZES:
        command = [sys.executable, "-m", "tools.bench.score_rows", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[f"rows_{rows}"] = json.loads(done.stdout)
    first, last = (results[f"rows_{rows}"]["peak_mib"] for rows in (SIZES[0], SIZES[-1]))
    return results | {"peak_mib_growth": last - first}


def score(rows: Iterable[Row]) -> Iterator[Scored]:
    for row in rows:
        yield Scored(row, {"sum": -12.5, "tokens": [-0.5] * 8, "is_greedy": False}, 50)


def measure(rows: int, folder: Path) -> dict[str, float]:
    source = folder / "rows.jsonl"
    with source.open("w") as file:
        for number in range(rows):
            row = {"id": f"row-{number}", "context": CONTEXT, "continuation": f" number {number}"}
            file.write(json.dumps(row) + "\n")
    job = Job(
        inputs=find_inputs([str(source)], None),
        columns={"context": "context", "continuation": "continuation"},
        optional={},
        id_column="id",
        rows_per_shard=5000,
        output_format="jsonl",
        compression="none",
        task={},
        model={},
    )
    store = LocalStore(folder / "out")
    began = time.perf_counter()
    manifest = open_job(store, job, lambda phase, done, total: None)
    planned, cpu = time.perf_counter(), time.process_time()
    worker = Worker(scorer=score, device="none", roofline_tokens_per_s=None)
    runner = ShardRunner(store=store, manifest=manifest, worker=worker)
    run_attempts(runner, read_state(store, manifest).todo(retry_failed=False), lambda commit: None)
    state = finish(store, manifest)
    ended, cpu = time.perf_counter(), time.process_time() - cpu
    assert state.complete and state.answered == rows
    return {
        "plan_rows_per_s": rows / (planned - began),
        "run_rows_per_s": rows / (ended - planned),
        "run_us_per_row": 1e6 * (ended - planned) / rows,
        "run_cpu_us_per_row": 1e6 * cpu / rows,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Of this program alone: getrusage's includes that of the process it was started from."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(measure(int(sys.argv[1]), Path(made))))
