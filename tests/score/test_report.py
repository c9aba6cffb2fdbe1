import dataclasses
import io

import pytest
from PIL import Image

from tests.score.test_shard import drive, set_up
from xlinfer.score.display import Meter
from xlinfer.score.job import read_state
from xlinfer.score.picture import draw
from xlinfer.score.report import GAP_S, as_text, covered, report


def test_seconds_are_those_in_which_anybody_worked():
    later = 10 * GAP_S
    spans = [(later, later + 1), (0, 4), (2, 5), (6, 8), (3, 4)]
    assert covered(spans) == pytest.approx(8 + 1)
    assert covered([]) == 0


def test_a_roofline_is_a_share_of_what_the_devices_could_do(tmp_path):
    runner = set_up(tmp_path)
    runner.worker = dataclasses.replace(runner.worker, roofline_tokens_per_s=1000.0, device="v6e")
    (commit,) = drive(runner)
    state = read_state(runner.store, runner.manifest)
    made = report(state)
    want = commit.scored_tokens / (1000.0 * (commit.ended - commit.started))
    assert made["roofline"]["fraction"] == pytest.approx(want)
    assert f"{100 * want:.1f} % of the roofline of prefill" in as_text(made)
    with Image.open(io.BytesIO(draw(made, [commit]))) as picture:
        assert picture.size == (1800, 900)


def test_the_meter_counts_and_says_what_is_left(monkeypatch):
    times = iter([0.0, 1.0, 1.0, 10.0])
    monkeypatch.setattr("xlinfer.score.display.time.monotonic", lambda: next(times))
    shown = []
    meter = Meter(lambda meter: shown.append(str(meter)), 1.0, 1000, 0)
    meter.add(100, 3, 5000)
    assert shown == ["100/1,000 rows, 3 failed, 500 tokens/s, 1 min 30 s left"]
