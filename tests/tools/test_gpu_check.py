import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.cases import OPS
from pallas_kernels.devices import DEVICES
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import engine, measure, runner, summary, targets
from tools.gpu_check import job as jobs
from tools.gpu_check.entrants import errors, passes

ROOT = Path(__file__).parents[2]


def test_a_chain_makes_every_call_though_all_are_alike():
    x = jnp.ones((8, 8))
    chain = measure.Chain(lambda x, y: x @ y, [(x, x)], calls=3)
    program = chain.compile()
    _, outputs = program.compiled([()], [(x, x)])
    assert len(outputs) == 3
    assert (program.compiled.as_text() or "").count(" dot(") == 3


def test_a_chain_updates_donated_arguments_from_call_to_call():
    def step(x, state):
        return x + state[0, 0], state + 1

    sets = [(jnp.full(2, 10.0 * i), jnp.zeros((2, 2))) for i in range(2)]
    program = measure.Chain(step, sets, calls=4, donated=(1,)).compile()
    kept = [(x,) for x, _ in sets]
    state, outputs = program.compiled([(s,) for _, s in sets], kept)
    assert [float(out[0][0]) for out in outputs] == [0, 10, 1, 11]
    assert [float(s[0, 0]) for (s,) in state] == [2, 2]


def test_time_is_of_one_call():
    x = jnp.ones((64, 64))
    slow = measure.Chain(lambda x: jax.lax.fori_loop(0, 30, lambda _, y: y @ x, x), [(x,)])
    found = measure.time_chain(slow.compile(), [(x,)], 0.02)
    assert 0 < found.ms < 1000 and found.kernel_ms is None


def test_inputs_are_rotated_until_the_cache_cannot_hold_them():
    for size in (10, 10**6, 10**8, 10**10):
        copies = measure.copies_for(size, dry_run=False)
        assert copies == measure.MAX_COPIES or copies * size >= measure.ROTATED_BYTES
    assert measure.nbytes(jnp.zeros((4, 4), jnp.int4)) == 8


def test_an_error_is_the_worst_output_and_nan_never_passes():
    want = jnp.ones((2, 2), jnp.bfloat16)
    good = errors([want, want], [want, want])
    assert good == {"max_error": 0, "l2_error": 0, "of_tolerance": 0}
    assert passes(good, ours=True) and passes(good, ours=False)
    off = errors([want, want * jnp.bfloat16(1.125)], [want, want])
    assert off["max_error"] == pytest.approx(0.125) and not passes(off, ours=True)
    for bad in (jnp.full((2, 2), jnp.nan, jnp.bfloat16), jnp.full((2, 2), jnp.inf, jnp.bfloat16)):
        assert not passes(errors([bad, want], [want, want]), ours=True)
        assert not passes(errors([want], [bad]), ours=False)
    with pytest.raises(ValueError, match="shape"):
        errors([want[0]], [want])


def test_what_json_cannot_hold_is_text():
    held = jobs.jsonable({"a": float("nan"), "b": [1.5, float("-inf")], "c": None})
    assert json.loads(json.dumps(held, allow_nan=False)) == {
        "a": "nan",
        "b": [1.5, "-inf"],
        "c": None,
    }


def test_a_cpu_is_not_measured_in_place_of_a_gpu():
    assert jobs.device_here(dry_run=True).name == "cpu"
    with pytest.raises(ValueError, match="no accelerator"):
        jobs.device_here(dry_run=False)


WORKER = """
import os, subprocess, sys, time
part, job = sys.argv[1:]
print('@record {"op": "a", "value": 1}', flush=True)
print("@progress halfway", flush=True)
print("noise", flush=True)
print("a reason", file=sys.stderr, flush=True)
if part == "abort":
    os.abort()
if part == "hang":
    subprocess.Popen(["sleep", "60"])
    time.sleep(60)
if part == "cut":
    print('@record {"op": "b", "va', end="", flush=True)
    os._exit(3)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A Runner whose workers do as WORKER says."""
    package = tmp_path / "tools" / "gpu_check"
    package.mkdir(parents=True)
    (package / "worker.py").write_text(WORKER)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "GRACE_S", 0.0)
    said: list[str] = []
    results = runner.Results(tmp_path / "out.json", {"command": []})
    ours = runner.Runner(results, tmp_path / "out.log", said.append)

    def run(part: str, seconds: float = 30.0) -> SimpleNamespace:
        ended_well = ours.run(runner.Task(part, ("a",), seconds, True, {}))
        document = json.loads(results.path.read_text())
        log = (tmp_path / "out.log").read_text()
        return SimpleNamespace(ended_well=ended_well, document=document, said=said, log=log)

    return run


def test_a_worker_reports_as_it_goes(worker):
    done = worker("fine")
    assert done.ended_well
    assert done.document["records"] == [{"part": "fine", "op": "a", "value": 1}]
    assert done.document["workers"][0]["status"] == "ok"
    assert "fine halfway" in done.said
    assert "noise" in done.log and "a reason" in done.log


@pytest.mark.parametrize(("part", "status"), [("abort", "exit -6"), ("cut", "exit 3")])
def test_a_crash_costs_only_what_was_not_reported(worker, part, status):
    done = worker(part)
    assert not done.ended_well
    assert done.document["records"] == [{"part": part, "op": "a", "value": 1}]
    assert done.document["workers"][0]["status"] == status
    assert "a reason" in done.document["workers"][0]["log"]


def test_a_worker_that_hangs_is_killed_with_what_it_started(worker):
    started = time.monotonic()
    done = worker("hang", seconds=2.0)
    assert time.monotonic() - started < 20
    assert (
        done.document["records"] and done.document["workers"][0]["status"] == "killed: out of time"
    )


def test_shares_add_up_to_the_budget():
    assert list(runner.shares({"a": 1, "b": 3}, 100)) == [("a", 25), ("b", 100)]


def test_each_op_gets_its_part_of_the_time_and_none_starts_without(monkeypatch, tmp_path):
    clock, tasks = [0.0], []
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: clock[0])

    def run(task):
        tasks.append(task)
        clock[0] += task.seconds
        return True

    results = runner.Results(tmp_path / "out.json", {})
    args = SimpleNamespace(op=["a", "b", "c"], engine=["bf16"], dry_run=True)
    fake = SimpleNamespace(run=run)
    gpu_check.run_part("timing", args, results, fake, end=90.0)  # type: ignore[arg-type]
    assert [(t.ops, t.seconds) for t in tasks] == [(("a",), 45), (("b",), 33.75), (("c",), 11.25)]
    gpu_check.run_part("engine", args, results, fake, end=90.0)  # type: ignore[arg-type]
    assert results.document["workers"] == [
        {"part": "engine", "ops": ["bf16"], "seconds": 0.0, "status": "out of time"}
    ]


def test_torch_goes_on_after_the_op_that_crashed_it(tmp_path):
    results, asked = runner.Results(tmp_path / "out.json", {}), []

    def run(task):
        asked.append(task.ops)
        results.add("records", {"part": "torch_timing", "op": task.ops[0], "begun": True})
        return len(task.ops) == 1

    args = SimpleNamespace(op=["a", "b", "c"], engine=[], dry_run=True)
    end = time.monotonic() + 60
    gpu_check.run_part("torch_timing", args, results, SimpleNamespace(run=run), end)  # type: ignore[arg-type]
    assert asked == [("c", "b", "a"), ("b", "a"), ("a",)]


def timing(case, ms, **fields):
    ours = {"name": "mosaic_gpu", "ms": ms, "ok": True} | fields.pop("ours", {})
    others = [{"name": "bf16 product", "ms": 2.0, "ok": True, "yardstick": False}]
    return {"part": "timing", "op": "int4_matmul", "case": case, "ours": ours, "others": others,
            "bound": "memory", "ceiling_ms": 0.5, "of_ceiling": 0.5 / ms, "bytes": 1e9,
            "targets": {}} | fields  # fmt: skip


def test_a_target_is_judged_by_its_worst_case():
    name = "W4A16 at any M, over bf16"
    of = lambda *values: [timing(str(i), 1.0, targets={name: v}) for i, v in enumerate(values)]
    verdict = lambda records: next(v for v in targets.verdicts(records) if v["target"] == name)
    assert verdict(of(2.0, 1.5))["verdict"] == "met"
    assert verdict(of(2.0, 0.9)) | {"least": 0} == {
        "target": name, "least": 0, "worst": 0.9, "case": "1", "cases": 2, "not_measured": 0,
        "verdict": "missed",
    }  # fmt: skip
    assert verdict(of(2.0, None))["verdict"] == "missed"
    assert verdict(of(None))["verdict"] == verdict([])["verdict"] == "not measured"


def test_a_wrong_alternative_is_no_competitor():
    faster = targets._faster_than("bf16")
    report = timing("a", 1.0)
    assert faster(report, {}) == 2.0
    wrong = {"name": "bf16, cuBLASLt", "ms": 0.1, "ok": False, "yardstick": False}
    assert faster(report | {"others": [*report["others"], wrong]}, {}) == 2.0
    assert faster(report | {"others": [wrong]}, {}) is None


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_every_target_has_a_case_of_a_published_model(target):
    cases = jobs.cases_of(target.op)
    assert any(target.counts(c, cases.work(c)) for c in cases.MODEL_CASES)


def test_cases_that_a_target_counts_are_timed_first():
    named = [SimpleNamespace(M=m, N=8192, K=28672) for m in (64, 16)]
    assert targets.first_of("int4_matmul", named, lambda case: None) == named[::-1]


def test_the_table_names_what_failed_is_wrong_or_was_left_out():
    torch_others = [
        {"name": "torch bf16", "ms": 0.5, "ok": True, "yardstick": False},
        {"name": "torch fp4", "why": "no such thing", "yardstick": False},
    ]
    document = {
        "workers": [
            {"part": "timing", "ops": ["x"], "status": "ok"},
            {"part": "engine", "ops": ["fp8"], "status": "exit -6", "log": ["Aborted"]},
        ],
        "records": [
            {"part": "ceilings", "ceilings": {"copy_GB_per_s": 4300.0}},
            {"part": "correctness", "op": "x", "case": "a", "ok": True, "of_tolerance": 0.5},
            {"part": "correctness", "op": "x", "case": "b", "ok": False, "why": "nan"},
            timing("fast", 1.0),
            timing("broken", 1.0, ours={"why": "OutOfMemory"}) | {"ours": {"why": "OutOfMemory"}},
            timing("bad", 1.0, ours={"ok": False}),
            {"part": "timing", "op": "int4_matmul", "skipped": ["late"], "why": "out of time"},
            {"part": "torch_timing", "op": "int4_matmul", "case": "fast", "others": torch_others},
            {"part": "engine", "quantization": "bf16", "model": "8B",
             "decode_1_tokens_per_s": 200.0},
            {"part": "tuning", "op": "x", "untunable": "no candidates"},
        ],
        "targets": targets.verdicts([]),
        "seconds": 1.0,
    }  # fmt: skip
    text = summary.text(document)
    fast = next(line for line in text.splitlines() if " fast " in line)
    assert "50%" in fast and "torch bf16" in fast and "0.50" in fast
    for part in ("FAILED OutOfMemory", "WRONG", "late", "no such thing", "decode_1 200", "exit -6",
                 "Aborted", "no candidates", "not measured", "copy_GB_per_s 4300.0"):  # fmt: skip
        assert part in text, part
    assert summary.faults(document) == 4  # a worker, a wrong case, two timed kernels


def test_a_run_that_is_stopped_still_ends_in_its_table(monkeypatch, tmp_path, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "run_part", stop)
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu_check.main(["--dry_run", f"--output={tmp_path}"]) == 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    document = json.loads((tmp_path / "gpu_check_dry_run.json").read_text())
    assert document["stopped"] and document["records"] == []
    assert "0 workers, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", ["--op=int5_matmul", "--part=timings", "--budget_s=0", "--engine=q"]
)
def test_wrong_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        gpu_check.main([flag])
    assert exit.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err


SWEPT = {
    "part": "tuning", "op": "int4_matmul", "case": "wide_decode", "key": "M=16,K=8192,N=28672",
    "tiles": {"kind": "Few", "n": 128, "stages": 4}, "ms": 0.5, "default_ms": 0.6, "sweep": [],
}  # fmt: skip


class Few(NamedTuple):
    n: int
    stages: int


def test_tile_choices_reach_the_op(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(tuning, "files", lambda package: tmp_path / package)
    (tmp_path / "pallas_kernels" / "int4_matmul").mkdir(parents=True)
    results = runner.Results(tmp_path / "out.json", {"date": "2026-11-22"})
    results.add("records", {"part": "ceilings", "device": "h200", "machine": {"packages": {}}})
    results.add("records", SWEPT)
    results.add("records", SWEPT | {"key": "M=1", "tiles": None})  # the kernel's own was best
    for key in ("M=16,K=8192,N=28672", "M=64"):  # a later run adds to what is there
        table = gpu_check.tuned_tables(results)
        table["int4_matmul"]["tiles"] = {key: table["int4_matmul"]["tiles"].popitem()[1]}
        (path,) = gpu_check.install_tuned({"tuned": table})
    assert path == tmp_path / "pallas_kernels" / "int4_matmul" / "tuned" / "h200.json"
    tuning._measured.cache_clear()
    try:
        key = tuning.key(M=16, K=8192, N=28672)
        for measured in (key, "M=64"):
            assert tuning.tuned("int4_matmul", DEVICES["h200"], measured, Few) == Few(128, 4)
        assert tuning.tuned("int4_matmul", DEVICES["h200"], "M=2", Few) is None
        assert tuning.tuned("int4_matmul", DEVICES["h100"], key, Few) is None
        assert tuning.tuned("no_such_op", DEVICES["h200"], key, Few) is None
    finally:
        tuning._measured.cache_clear()


def dry_run(tmp_path: Path, *flags: str) -> dict:
    """The script itself, as a person starts it."""
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), "--dry_run", f"--output={tmp_path}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [*command, *flags], env=environment | {"PYTHON": sys.executable}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, textwrap.indent(done.stdout[-4000:] + done.stderr[-2000:], "  ")
    return json.loads((tmp_path / "gpu_check_dry_run.json").read_text())


def test_a_dry_run_of_one_op(tmp_path):
    parts = ("ceilings", "correctness", "timing", "tuning")
    document = dry_run(tmp_path, "--op=int8_matmul", *(f"--part={p}" for p in parts))
    assert [w["part"] for w in document["workers"]] == list(parts)
    of = lambda part: [r for r in document["records"] if r["part"] == part]
    assert of("ceilings")[-1]["ceilings"]["copy_GB_per_s"] > 0
    assert all(r["ok"] and r["repeatable"] for r in of("correctness"))
    (timed,) = of("timing")
    assert timed["ours"]["ms"] > 0 and timed["ours"]["ok"] and timed["of_ceiling"] > 0
    assert any(o["ok"] and o["ms"] > 0 for o in timed["others"])
    assert of("tuning")[0]["sweep"][0]["ok"]
    assert not (ROOT / "pallas_kernels" / "int8_matmul" / "tuned" / "cpu.json").exists()


@pytest.mark.slow
def test_an_artifact_starts_without_compiling_and_gives_the_same_tokens(tmp_path):
    document = dry_run(tmp_path, "--part=artifact")
    records = document["records"]
    starts = {r["start"]: r for r in records if "start" in r}
    counts = {name: (r["traces"] > 0, r["compiles"] > 0) for name, r in starts.items()}
    assert counts == {
        "artifact": (False, False), "uncached": (True, True), "cached": (True, False),
    }  # fmt: skip
    assert all(r["phases"]["first token"] > 0 and len(r["answers"]) == 4 for r in starts.values())
    assert starts["artifact"]["plan"] == starts["uncached"]["plan"]
    compared = [r for r in records if "compared" in r]
    assert len(compared) == 2 and all(r["equal"] and r["tokens"] == 128 for r in compared)


def test_every_engine_can_be_named():
    assert set(engine.ENGINES) == {*gpu_check.ENGINES, *gpu_check.TRIALS}


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path):
    document = dry_run(tmp_path)
    for part in ("correctness", "timing", "tuning"):
        assert {r["op"] for r in document["records"] if r["part"] == part} == set(OPS)
    engines = {r["quantization"]: r for r in document["records"] if r["part"] == "engine"}
    assert set(engines) == set(gpu_check.ENGINES)
    assert all(r["prefill_64_tokens_per_s"] > 0 for r in engines.values())
