"""The artifact part of tools/gpu_check: what counts as alike, and what a start that fails costs."""

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import artifact, engine, runner, starts, summary
from tools.gpu_check.job import Job
from xlinfer.compile.artifact import FORMAT, own_digest

ROOT = Path(__file__).parents[2]


def answer(*tokens: int, logprob: float = -1.0) -> dict:
    return {"tokens": list(tokens), "logprobs": [logprob] * len(tokens), "lead": [0.5] * 3}


def test_equal_answers_are_equal_and_their_logprobs_compared():
    ours = [answer(1, 2, 3), answer(4, 5, 6, logprob=-1.25)]
    found = starts.compare(ours, [answer(1, 2, 3), answer(4, 5, 6)])
    assert found == {
        "equal": True, "tokens": 6, "tokens_agreed": 6, "first_differences": [],
        "largest_logprob_difference": 0.25,
    }  # fmt: skip


def test_the_first_difference_of_each_prompt_is_named_and_nothing_compared_after_it():
    ours = [answer(1, 2, 3), answer(4, 9, 6), answer(9, 8, 7)]
    theirs = [answer(1, 2, 3), answer(4, 5, 6), answer(7, 8, 7)]
    theirs[1]["logprobs"] = [-1.125, -50.0, -50.0]
    found = starts.compare(ours, theirs)
    assert not found["equal"] and found["tokens_agreed"] == 4
    assert found["largest_logprob_difference"] == 0.125
    assert found["first_differences"] == [
        {"prompt": 1, "at": 1, "tokens": [9, 5], "lead": 0.5},
        {"prompt": 2, "at": 0, "tokens": [9, 7], "lead": 0.5},
    ]


def start(name: str, *tokens: int, **fields) -> dict:
    found = {
        "part": "artifact", "start": name, "seconds": 9.0, "traces": 0, "compiles": 0,
        "phases": {"import": 5.0, "weights": 4.0}, "answers": [answer(*tokens)],
    }  # fmt: skip
    return found | fields


def test_starts_that_differ_trace_or_are_refused_at_home_are_faults():
    alike = [start("artifact", 1, 2), start("uncached", 1, 2, compiles=9)]
    alike += starts.comparisons(alike)
    assert alike[-1]["equal"] and starts.faults(alike, dry_run=False) == 0
    unlike = [start("artifact", 1, 2), start("uncached", 1, 3), start("cached", 1, 3)]
    unlike += starts.comparisons(unlike)
    assert [r["equal"] for r in unlike if "compared" in r] == [False, True]
    assert starts.faults(unlike, dry_run=False) == 1
    assert starts.faults([start("artifact", 1, traces=1)], dry_run=False) == 1
    refused = [{"start": "artifact", "refused": "another jax"}, start("uncached", 1)]
    assert starts.comparisons(refused) == []
    assert starts.faults(refused, dry_run=False) == 0 and starts.faults(refused, dry_run=True) == 1


def test_the_table_says_how_starts_differ_and_what_was_refused():
    rows = [start("artifact", 1, 2), start("uncached", 1, 3)]
    rows += [{"part": "artifact", **r} for r in starts.comparisons(rows)]
    rows += [{"part": "artifact", "start": "artifact", "refused": "it is for NVIDIA H200"}]
    rows += [{"part": "artifact", "ops": ["cached"], "status": "out of time"}]
    text = summary.text({"workers": [], "records": rows})
    timed = next(line for line in text.splitlines() if "import 5.0, weights 4.0" in line)
    assert timed.split()[:5] == ["artifact", "9.0", "5.0", "0", "0"]
    for part in (
        "DIFFERENT tokens in 1 prompts, first in prompt 0 at 1 (2 for 3, which led by 0.5)",
        "REFUSED: it is for NVIDIA H200", "cached     left out: out of time",
    ):  # fmt: skip
        assert part in text, part
    assert summary.faults({"workers": [], "records": rows}) == 1


def run(tmp_path: Path, end: float, *, fails: tuple = (), dry_run: bool = False):
    results, tasks = runner.Results(tmp_path / "out.json", {}), []

    def worker(task):
        tasks.append(task)
        ended_well = task.ops[0] not in fails or not task.scratch
        results.add("workers", {"part": "artifact", "ops": task.ops, "seconds": 20.0})
        if ended_well and task.ops[0] in starts.STARTS:
            results.add("records", start(task.ops[0], 1, 2))
        return ended_well

    args = SimpleNamespace(artifact=Path("given"), dry_run=dry_run)
    fake = SimpleNamespace(run=worker)
    gpu_check.run_starts(args, results, fake, time.monotonic() + end)  # type: ignore[arg-type]
    return tasks, results.of("artifact")


def test_the_starts_run_one_by_one_and_are_compared(tmp_path):
    tasks, records = run(tmp_path, 100.0)
    assert [t.ops for t in tasks] == [("artifact",), ("uncached",), ("cached",)]
    assert {t.artifact for t in tasks} == {str(Path("given").absolute())}
    assert tasks[0].seconds == pytest.approx(50, abs=1)  # what hangs leaves half
    assert [r["compared"] for r in records if "compared" in r] == [list(x) for x in starts.COMPARED]


def test_programs_that_cannot_be_kept_do_not_cost_the_comparison(tmp_path):
    tasks, records = run(tmp_path, 100.0, fails=("uncached",))
    assert [(t.ops[0], bool(t.scratch)) for t in tasks] == [
        ("artifact", True), ("uncached", True), ("uncached", False), ("cached", True),
    ]  # fmt: skip
    assert any(r.get("compared") == ["artifact", "uncached"] for r in records)


def test_the_third_start_is_left_out_where_time_is_short(tmp_path):
    tasks, records = run(tmp_path, 25.0)
    assert [t.ops for t in tasks] == [("artifact",), ("uncached",)]
    assert any(r.get("status") == "out of time" for r in records)


def test_a_dry_run_compiles_first_and_ends_where_that_fails(tmp_path):
    tasks, records = run(tmp_path, 100.0, fails=("compile",), dry_run=True)
    assert [t.ops for t in tasks] == [("compile",)] and not records


def test_without_an_artifact_the_part_is_skipped_and_says_what_writes_one(tmp_path, capsys):
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu_check.main(["--part=artifact", f"--output={tmp_path}"]) == 0
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert starts.compile_command() in capsys.readouterr().out
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert document["workers"] == [] and document["no_artifact"] == starts.compile_command()


def test_a_dry_run_takes_no_artifact(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--dry_run", "--artifact=here"])
    assert "a dry run compiles its own" in capsys.readouterr().err


def test_the_documented_command_is_the_one_that_fits():
    assert starts.compile_command() in (ROOT / "docs" / "compile.md").read_text()
    assert (ROOT / "tools" / "gpu_check" / "llama3_8b.json").is_file()
    assert engine.model_config(dry_run=False).num_layers == 32


@pytest.mark.parametrize(
    "written, says",
    [
        (None, "is no compiled artifact"),
        ({"format": 99}, "is of format 99"),
        (
            {"format": FORMAT, "setup": {"quantization": "int4"}},
            "is of another config, sizes, dtype",
        ),
    ],
)
def test_a_refusal_is_a_result_with_its_reason(written, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", lambda f: None)
    if written is not None:
        sealed = written | {"sha256": own_digest(written)}
        (tmp_path / "compiled.json").write_text(json.dumps(sealed))
    job = Job(
        part="artifact", ops=("artifact",), dry_run=True, deadline=0.0, ceilings={},
        started=time.monotonic(), artifact=str(tmp_path), scratch="",
    )  # fmt: skip
    artifact.main(job)
    found = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("@record "))
    assert found["start"] == "artifact" and says in found["refused"]
