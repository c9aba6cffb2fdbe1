"""Workers that die or sleep at any point: each row is there once, with the right values."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.score.fake import check_output, write_input

ROOT = Path(__file__).parents[2]
ROWS = 30  # four shards
STEPS = (
    *("begin", "planned", "row", "logged", "drafted", "committed", "published", "cleared"),
    *("ran", "finished"),
)
NEVER = ["never", 1, "SIGKILL"]

points = st.one_of(
    st.tuples(st.just("row"), st.integers(1, ROWS)),
    st.tuples(st.sampled_from(STEPS), st.integers(1, 4)),
)


def drivers(*signals: str):
    return st.builds(lambda point, name: [*point, name], points, st.sampled_from(signals))


def run(folder: Path, stages: list[list[list]]) -> None:
    source, output = folder / "rows.jsonl", folder / "out"
    write_input(source, ROWS)
    arguments = [str(output), str(source), json.dumps(stages)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.score.processes", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_output(output, ROWS)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(stages=st.lists(st.lists(drivers("SIGKILL", "SIGSTOP"), min_size=1, max_size=3), max_size=3))
def test_killed_and_stopped_drivers_lose_and_double_nothing(stages, tmp_path_factory):
    run(tmp_path_factory.mktemp("job"), [*stages, [NEVER]])


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_at_every_step(signal, tmp_path):
    """One driver after the other, each lost at another step; those that sleep all wake last."""
    run(tmp_path, [*([[step, 1, signal]] for step in STEPS), [NEVER]])


def test_two_drivers_at_once_agree_on_one_plan(tmp_path):
    run(tmp_path, [[NEVER, NEVER, NEVER]])
