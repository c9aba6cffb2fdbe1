"""The command, in a process of its own, with a task in plain Python."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from tests.score.fake import check_output, read_lines, write_input

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.score.fake_command"]
ROWS = 30


def arguments(folder: Path, *more: str) -> list[str]:
    if not (folder / "rows.jsonl").exists():
        write_input(folder / "rows.jsonl", ROWS)
    return [
        "--task=fake", f"--input={folder}/rows.jsonl", f"--output={folder}/out",
        "--id-column=key", "--rows-per-shard=8", f"--switches={folder}", *more,
    ]  # fmt: skip


def command(*given: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *given], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | environment,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_job_its_report_and_its_second_run(tmp_path):
    done = command(*arguments(tmp_path))
    assert done.returncode == 3, done.stderr
    assert "26 of 30 rows answered, 4 failed" in done.stdout
    assert "4 rows: this is bad" in done.stdout
    assert "Scoring: 30/30 rows, 4 failed" in done.stderr
    check_output(tmp_path / "out", ROWS)
    made = json.loads((tmp_path / "out/report.json").read_text())
    assert made["rows"] == {"answered": 26, "failed": 4, "all": 30}
    assert made["failures"] == {"this is bad": 4} and made["rows_per_s"] > 0
    assert made["roofline"]["why"] == "the peak rates of fake are not known"
    times = made["worker_seconds"]
    assert times["reading"] + times["scoring"] + times["writing"] == pytest.approx(
        times["all"], rel=0.2
    )
    with Image.open(tmp_path / "out/report.png") as picture:
        assert picture.size == (1800, 900)
    before = {path: path.read_bytes() for path in tmp_path.glob("out/**/part-*")}
    again = command(*arguments(tmp_path))
    assert again.returncode == 3 and "Scoring" not in again.stderr
    assert before == {path: path.read_bytes() for path in tmp_path.glob("out/**/part-*")}


def test_failed_rows_are_retried_when_asked(tmp_path):
    assert command(*arguments(tmp_path)).returncode == 3
    (tmp_path / "good").touch()
    done = command(*arguments(tmp_path, "--retry_failed"))
    assert done.returncode == 0, done.stderr
    assert "30 of 30 rows answered, 0 failed" in done.stdout
    rows = read_lines(tmp_path / "out", "parts/*")
    assert sorted(row["id"] for row in rows) == sorted(f"row-{n}" for n in range(ROWS))
    assert {row["id"] for row in rows if "good" in row} == {f"row-{n}" for n in (3, 10, 17, 24)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@contextmanager
def hanging(folder: Path):
    """The command, at row-12, after those before it."""
    (folder / "hang").touch()
    with subprocess.Popen(
        [*COMMAND, *arguments(folder)], cwd=ROOT, text=True, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("out/work/00001/*/log")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        yield process
    (folder / "hang").unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_finished_though_the_engine_hangs(number, tmp_path):
    with hanging(tmp_path) as process:
        started = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75 and time.monotonic() - started < 10
        assert "the same command goes on from there" in said
    logs = b"".join(path.read_bytes() for path in tmp_path.glob("out/work/00001/*/log"))
    assert logs.count(b"\n") == 7, "the shard's first four, and three of the window with row-12"
    assert command(*arguments(tmp_path)).returncode == 3
    check_output(tmp_path / "out", ROWS)


def test_a_second_signal_ends_at_once(tmp_path):
    with hanging(tmp_path) as process:
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        while "Stopping" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 75 and time.monotonic() - started < 5


def test_static_ranks_share_the_shards_and_the_last_one_finishes(tmp_path):
    first = command(*arguments(tmp_path, "--runner=static"), SLURM_PROCID="1", SLURM_NTASKS="2")
    assert first.returncode == 0, first.stderr
    assert "2 of 4 shards are done; others run the rest" in first.stdout
    parts = sorted(path.name for path in tmp_path.glob("out/parts/*"))
    assert parts == ["part-00001.jsonl", "part-00003.jsonl"]
    assert not (tmp_path / "out/_SUCCESS").exists()
    last = command(*arguments(tmp_path, "--runner=static", "--rank=0", "--world_size=2"))
    assert last.returncode == 3
    check_output(tmp_path / "out", ROWS)


MISTAKES = {
    "no task": (2, ["--task="], "value should be one of <fake|two>"),
    "unknown flag": (2, ["--outptu=x"], "Did you mean: output"),
    "no such input": (1, ["--input=/nowhere/*.jsonl"], "/nowhere/*.jsonl: there is no such"),
    "column": (2, ["--column=text=prompt"], "should be NAME=COLUMN, with a name of --task=fake"),
    "missing column": (1, ["--column=prompt=text"], "no column 'text' (--column=prompt=text)"),
    "no model": (1, ["--model=/nowhere"], "/nowhere"),
    "no ranks": (2, ["--runner=static"], "SLURM_PROCID, TPU_WORKER_ID is set"),
    "resources": (2, ["--runner=ray", "--resources_per_actor=GPU"], "should be like TPU=4"),
    "store": (1, ["--output=ftp://x/y"], "in ftp:// no file can be created on condition"),
    "compression": (1, ["--output_format=parquet", "--compression=gz"], "compresses within"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_a_line(name, tmp_path):
    code, given, message = MISTAKES[name]
    done = command(*arguments(tmp_path, *given))
    assert done.returncode == code and message in done.stderr, done.stderr
    assert not list(tmp_path.glob("out/*"))


def test_help_names_every_flag_once_by_group():
    shown = command("--help").stdout
    titles = ["Task:", "Input:", "Output:", "Runner:", "Engine:"]
    assert [line for line in shown.splitlines() if line in titles] == titles
    for name in ("task", "input", "output", "runner", "model", "retry_failed", "max_num_seqs"):
        assert sum(line.split("]")[-1].strip("- ") == name for line in shown.splitlines()) == 1
    assert "--block_size" not in shown.replace("Also --block_size", "")
