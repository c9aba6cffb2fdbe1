import json
import shutil

import pytest

from tests.score import fake
from tests.score.test_shard import drive, set_up
from xlinfer.score.job import open_job
from xlinfer.score.manifest import JobError, Manifest
from xlinfer.score.planning import plan
from xlinfer.score.store import LocalStore

ROWS = 30


@pytest.fixture
def source(tmp_path):
    fake.write_input(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


def test_a_manifest_is_read_as_it_was_written(source):
    manifest = plan(fake.job_of(source), fake.quiet)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert [shard.rows for shard in manifest.shards] == [8, 8, 8, 6]


DIFFERENT = {
    "rows_per_shard": (9, "rows_per_shard is 8 there, 9 here"),
    "task": ({"task": "fake", "seed": 1}, "task.seed is not given there, 1 here"),
    "model": ({"name": "other"}, 'model.name is "fake" there, "other" here'),
    "columns": ({"prompt": "key"}, 'columns.prompt is "prompt" there, "key" here'),
    "output_format": ("parquet", 'output_format is "jsonl" there, "parquet" here'),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_job_is_refused_naming_what_differs(name, source, tmp_path):
    store = LocalStore(tmp_path / "out")
    open_job(store, fake.job_of(source), fake.quiet)
    value, message = DIFFERENT[name]
    with pytest.raises(JobError, match="holds another job") as caught:
        open_job(store, fake.job_of(source, **{name: value}), fake.quiet)
    assert f"another job: {message}. Give" in str(caught.value)


def test_a_changed_or_further_input_is_another_job(source, tmp_path):
    store = LocalStore(tmp_path / "out")
    open_job(store, fake.job_of(source), fake.quiet)
    fake.write_input(tmp_path / "more.jsonl", 2)
    with pytest.raises(JobError, match=r"inputs more.jsonl.size is not given there, \d+ here"):
        open_job(store, fake.job_of(source, tmp_path / "more.jsonl"), fake.quiet)
    fake.write_input(source, ROWS + 1)
    with pytest.raises(JobError, match=r"inputs rows.jsonl.size is \d+ there, \d+ here"):
        open_job(store, fake.job_of(source), fake.quiet)


def test_results_without_their_plan_are_refused(tmp_path):
    drive(set_up(tmp_path))
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(JobError, match=r"holds commits/00000.json and no manifest.json"):
        set_up(tmp_path)
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(JobError, match=r"manifest.json is not what xlinfer writes"):
        set_up(tmp_path)


def test_a_job_goes_on_where_shards_are_missing(tmp_path):
    drive(set_up(tmp_path, rows=ROWS, rows_per_shard=8))
    before = (tmp_path / "out/_SUCCESS").read_text()
    for path in ("commits/00002.json", "parts/part-00002.jsonl", "errors/part-00002.jsonl"):
        (tmp_path / "out" / path).unlink()
    (tmp_path / "out/_SUCCESS").unlink()
    (commit,) = drive(set_up(tmp_path, rows_per_shard=8))
    assert commit.rows + commit.failed == 8
    fake.check_output(tmp_path / "out", ROWS)
    assert (tmp_path / "out/_SUCCESS").read_text() == before, "the same rows, the same digest"


def test_an_input_that_goes_stops_its_shards_alone(tmp_path):
    for name in "ab":
        fake.write_input(tmp_path / f"{name}.jsonl", 8)
    job = fake.job_of(tmp_path / "a.jsonl", tmp_path / "b.jsonl", id_column=None)
    store = LocalStore(tmp_path / "out")
    manifest = open_job(store, job, fake.quiet)
    shutil.move(tmp_path / "a.jsonl", tmp_path / "away")
    from xlinfer.score.shard import ShardRunner

    runner = ShardRunner(store=store, manifest=manifest, worker=fake.WORKER)
    with pytest.raises(JobError, match=r"1 shards are not done: .*a\.jsonl: there is no such file"):
        drive(runner)
    assert [path.name for path in tmp_path.glob("out/parts/*")] == ["part-00001.jsonl"]
    assert not (tmp_path / "out/_SUCCESS").exists()
    shutil.move(tmp_path / "away", tmp_path / "a.jsonl")
    drive(runner)
    success = json.loads((tmp_path / "out/_SUCCESS").read_text())
    assert success["rows"] + success["failed"] == 16
