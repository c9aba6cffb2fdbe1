import json

import numpy as np
import pytest

from tools.bench import __main__ as bench
from tools.bench import report


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """`tools.bench` with two benchmarks in place of its own: one works, one raises."""
    (tmp_path / "good.py").write_text(
        '"""Measures nothing."""\n\ndef main():\n    return {"a_s": 0.5, "b": {"n": 3}}\n'
    )
    (tmp_path / "bad.py").write_text(
        '"""Fails."""\n\ndef main():\n    return {"a_s": float("nan")}\n'
    )
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr("tools.bench.__path__", [str(tmp_path)])


def test_percentiles_are_numpys():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for percent in (0, 10, 50, 90, 99, 100):
        assert report.percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    with pytest.raises(ValueError, match="no values"):
        report.percentile([], 50)
    with pytest.raises(ValueError, match="101"):
        report.percentile(values, 101)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (26.949, "26.95"), (1234567.8, "1,234,568"), (0.00123456, "0.001235"),
     (3e-7, "3.000e-07"), (32, "32"), ("cpu", "cpu"), (-2.5, "-2.500")],
)  # fmt: skip
def test_numbers_have_four_digits(value, text):
    assert report.number(value) == text


def test_one_benchmark_ends_with_json_that_is_also_stored(benchmarks, capsys, tmp_path):
    path = tmp_path / "out.json"
    assert bench.main(["good", f"--json={path}"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads(path.read_text())
    assert document["results"] == {"good": {"a_s": 0.5, "b": {"n": 3}}}
    assert document["command"] == f"./run bench good --json={path}"
    assert document["device"]["count"] == 4 and document["cpu"]["cores"] >= 1
    assert set(report.PACKAGES) < set(document["versions"])
    assert "b.n" in out and "0.5000" in out


def test_a_failing_benchmark_is_named_and_costs_only_itself(benchmarks, capsys):
    assert bench.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED: bad" in lines
    assert list(json.loads(lines[-1])["results"]) == ["good"]


def test_unknown_names_are_refused_with_the_known_ones(benchmarks, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(["goud"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "goud" in message and "bad, good" in message


def test_list_describes_without_running(capsys):
    assert bench.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "bandwidth    Ceilings of this machine" in listed
    assert "report" not in listed.split()
