"""`python -m xlinfer.score` with the demo model."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = 60
SMALL = ("--max_num_seqs=4", "--max_num_batched_tokens=64", "--max_model_len=128")
READY_S = 180  # even where others use the machine


def start(folder: Path) -> subprocess.Popen[str]:
    flags = ["--task=generate", "--max_tokens=4", f"--input={folder}/rows.jsonl", "--id_column=key"]
    more = [f"--output={folder}/out", "--rows_per_shard=20", f"--compile_cache_dir={folder}/cache"]
    command = [sys.executable, "-m", "xlinfer.score", *flags, *more, *SMALL]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)


def test_a_job_that_is_preempted_goes_on_and_answers_every_row(tmp_path):
    prompts = [f"def f{n}(x):\n    return" for n in range(ROWS)]
    prompts[7] = "x " * 500
    rows = [{"key": f"k{n}", "prompt": prompt} for n, prompt in enumerate(prompts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    process = start(tmp_path)
    deadline = time.monotonic() + READY_S
    while not list(tmp_path.glob("out/commits/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    if process.returncode != 3:  # else it was done before the signal came
        assert process.returncode == 75, said
        process = start(tmp_path)
        _, said = process.communicate(timeout=READY_S)
    assert process.returncode == 3 and "Traceback" not in said, said
    parts = sorted(tmp_path.glob("out/parts/*"))
    found = [json.loads(line) for path in parts for line in path.read_text().splitlines()]
    assert [row["id"] for row in found] == [f"k{n}" for n in range(ROWS) if n != 7]
    assert all(row["text"] for row in found)
    (error,) = map(json.loads, (tmp_path / "out/errors/part-00000.jsonl").read_text().splitlines())
    assert error["id"] == "k7" and "128" in error["error"]


def test_a_model_that_is_not_there_is_told_in_a_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}')
    done = subprocess.run(
        [sys.executable, "-m", "xlinfer.score", "--task=generate", "--model=/nowhere",
         f"--input={tmp_path}/rows.jsonl", f"--output={tmp_path}/out"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert "/nowhere" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--temperature=-1", "--top_p=2"])
def test_options_of_tasks_are_checked_before_anything_is_read(flag):
    done = subprocess.run(
        [sys.executable, "-m", "xlinfer.score", "--task=generate", "--input=x", "--output=y", flag],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and flag.partition("=")[0] in done.stderr, done.stderr
