"""Real actors, of which one is killed, and a driver that is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.score.fake import check_output, write_input

ROOT = Path(__file__).parents[2]
ROWS = 64
STARTS_S = 120  # with other work on the machine
pytestmark = pytest.mark.slow


def start(folder: Path, pause_s: float) -> subprocess.Popen[str]:
    if not (folder / "rows.jsonl").exists():
        write_input(folder / "rows.jsonl", ROWS)
    arguments = [str(folder / "out"), str(folder / "rows.jsonl"), str(pause_s)]
    command = [sys.executable, "-m", "tests.score.ray_driver", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_rows(folder: Path, actors: int, rows: int) -> list[int]:
    """Processes of so many actors, when each has scored so many rows."""
    deadline, sizes = time.monotonic() + STARTS_S, dict[int, int]()
    while time.monotonic() < deadline:
        sizes = {int(p.name.split("-")[1]): p.stat().st_size for p in folder.glob("actor-*")}
        if sum(size >= rows for size in sizes.values()) >= actors:
            return list(sizes)
        time.sleep(0.02)
    raise AssertionError(f"no {actors} actors with {rows} rows: {sizes}")


def test_an_actor_killed_in_a_shard_is_replaced(tmp_path):
    driver = start(tmp_path, 0.1)
    victim, _ = wait_for_rows(tmp_path, 2, 5)
    os.kill(victim, signal.SIGKILL)
    _, err = driver.communicate(timeout=STARTS_S)
    assert driver.returncode == 0, err
    assert "An actor was lost at shard" in err
    check_output(tmp_path / "out", ROWS)
    assert len(list(tmp_path.glob("actor-*"))) == 3, "Ray has started another"


def test_a_driver_that_is_told_to_stop_stops_its_actors(tmp_path):
    write_input(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "hang").touch()
    command = [
        sys.executable, "-m", "tests.score.fake_command", "--task=fake", "--runner=ray",
        f"--input={tmp_path}/rows.jsonl", f"--output={tmp_path}/out", "--id_column=key",
        "--rows_per_shard=8", f"--switches={tmp_path}", "--num_actors=2",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE) as driver:
        deadline = time.monotonic() + STARTS_S
        while not (tmp_path / "out/commits/00007.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)  # in row-12, after those before it, which are in the log
        driver.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == 75 and time.monotonic() - asked < 10, said
    assert "Traceback" not in said, said
    (tmp_path / "hang").unlink()
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=STARTS_S)
    assert done.returncode == 3, done.stderr
    assert "8/8 rows" in done.stderr
    check_output(tmp_path / "out", ROWS)


def test_a_killed_driver_goes_on_where_it_was(tmp_path):
    driver = start(tmp_path, 0.1)
    wait_for_rows(tmp_path, 2, 20)  # past a shard and its log's sync
    driver.kill()
    driver.communicate()
    before = {path.name for path in tmp_path.glob("out/commits/*")}
    assert before and not (tmp_path / "out/_SUCCESS").exists()
    scored = sum(path.stat().st_size for path in tmp_path.glob("actor-*"))
    for path in tmp_path.glob("actor-*"):
        path.unlink()
    driver = start(tmp_path, 0.0)
    out, err = driver.communicate(timeout=STARTS_S)
    assert driver.returncode == 0, err
    check_output(tmp_path / "out", ROWS)
    again = sum(path.stat().st_size for path in tmp_path.glob("actor-*"))
    assert scored + again < ROWS + 40, "what was logged is not scored again"
    shards = len(json.loads((tmp_path / "out/manifest.json").read_text())["shards"])
    assert out.count("committed") == shards - len(before)
