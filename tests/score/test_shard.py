import gzip
import json
import shutil
import threading
import time
from collections import Counter

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.score import fake
from xlinfer.score import shard
from xlinfer.score.job import finish, open_job, read_state, run_attempts
from xlinfer.score.layout import Attempt
from xlinfer.score.rowlog import Entry, RowLog
from xlinfer.score.rows import Scored
from xlinfer.score.shard import Commit, Interrupted, ShardRunner, Worker
from xlinfer.score.store import LocalStore

ROWS = 20


def set_up(folder, scorer=fake.scorer, rows=ROWS, **changes):
    """A runner over a job of so many rows, in one shard unless `changes` say otherwise."""
    if not (folder / "rows.jsonl").exists():
        fake.write_input(folder / "rows.jsonl", rows)
    job = fake.job_of(folder / "rows.jsonl", **{"rows_per_shard": 100} | changes)
    store = LocalStore(folder / "out")
    worker = Worker(scorer=scorer, device="fake", roofline_tokens_per_s=None)
    return ShardRunner(store=store, manifest=open_job(store, job, fake.quiet), worker=worker)


def drive(runner: ShardRunner, *, retry_failed: bool = False) -> list[Commit]:
    made = []
    todo = read_state(runner.store, runner.manifest).todo(retry_failed=retry_failed)
    run_attempts(runner, todo, made.append)
    finish(runner.store, runner.manifest)
    return made


def first(runner: ShardRunner) -> Attempt:
    return Attempt(shard=runner.manifest.shards[0])


class Lost(Exception):
    pass


def counting(asked: Counter, upto: int | None = None):
    """The fake scorer, which counts the rows that it is asked for, and is lost after `upto`."""

    def scorer(rows):
        for number, scored in enumerate(fake.scorer(asked.update([row.id]) or row for row in rows)):
            if number == upto:
                raise Lost
            yield scored

    return scorer


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(upto=st.integers(0, ROWS - 1), cut=st.floats(0, 1), garbage=st.binary(max_size=20))
def test_a_log_goes_on_from_any_byte(upto, cut, garbage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    runner = set_up(folder, counting(Counter(), upto))
    with pytest.raises(Lost):
        runner.run(first(runner))
    (log,) = folder.glob("out/work/00000/*/log")
    data = log.read_bytes()
    assert data.count(b"\n") == upto, "what was finished is in the log"
    kept = data[: int(cut * len(data))]
    log.write_bytes(kept + garbage.replace(b"\n", b"?"))
    asked = Counter()
    drive(set_up(folder, counting(asked)))
    fake.check_output(folder / "out", ROWS)
    assert asked.total() == ROWS - kept.count(b"\n") and set(asked.values()) <= {1}


def test_rows_that_two_workers_have_logged_count_once(tmp_path):
    runner = set_up(tmp_path, counting(Counter(), 12))
    with pytest.raises(Lost):
        runner.run(first(runner))
    (folder,) = tmp_path.glob("out/work/00000/*")
    shutil.copytree(folder, folder.with_name("another"))
    (commit,) = drive(set_up(tmp_path))
    assert (commit.rows, commit.failed, commit.tokens) == (17, 3, ROWS * fake.TOKENS)
    fake.check_output(tmp_path / "out", ROWS)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.booleans(), st.text())
def test_no_part_of_an_entry_is_an_entry(number, tokens, ok, text):
    entry = Entry(number, tokens, ok, json.dumps({"id": text}).encode())
    line = entry.line()
    assert line.count(b"\n") == 1 and Entry.parse(line[:-1]) == entry
    assert all(Entry.parse(line[:end]) is None for end in range(len(line) - 1))


def test_a_worker_that_wakes_after_another_has_finished_changes_nothing(tmp_path):
    late = set_up(tmp_path)
    asleep, awake = threading.Event(), threading.Event()

    def step(name: str) -> None:
        if name == "drafted":
            asleep.set()
            assert awake.wait(60)

    late.step = step
    results = []
    thread = threading.Thread(target=lambda: results.append(late.run(first(late))))
    thread.start()
    assert asleep.wait(60)
    (winner,) = drive(set_up(tmp_path, counting(Counter())))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/**/*") if p.is_file()}
    awake.set()
    thread.join()
    assert results == [winner]
    after = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/**/*") if p.is_file()}
    assert before == after
    fake.check_output(tmp_path / "out", ROWS)


def test_rows_that_failed_are_tried_again_on_their_own(tmp_path):
    (first_commit,) = drive(set_up(tmp_path))
    assert (first_commit.rows, first_commit.failed) == (17, 3)
    assert first_commit.failures == {"this is bad": 3}
    assert drive(set_up(tmp_path)) == [], "nothing is left to do unless it is asked for"

    def half(rows):
        for row in rows:
            good = row.id == "row-10"
            yield Scored(row, {"late": True}, 1) if good else next(fake.scorer([row]))

    (second,) = drive(set_up(tmp_path, half), retry_failed=True)
    assert (second.rows, second.failed, second.scored) == (1, 2, 3)
    everything = lambda rows: (Scored(row, {"late": True}, 1) for row in rows)
    (third,) = drive(set_up(tmp_path, everything), retry_failed=True)
    assert (third.rows, third.failed) == (2, 0)
    assert drive(set_up(tmp_path), retry_failed=True) == []
    rows = fake.read_lines(tmp_path / "out", "parts/*")
    assert sorted(row["id"] for row in rows) == sorted(f"row-{n}" for n in range(ROWS))
    assert [row["id"] for row in rows if "late" in row] == ["row-10", "row-3", "row-17"]
    success = json.loads((tmp_path / "out/_SUCCESS").read_text())
    assert (success["rows"], success["failed"], success["attempts"]) == (ROWS, 0, 3)


def test_a_worker_that_is_told_to_stop_keeps_what_it_has(tmp_path):
    asked = Counter()
    runner = set_up(tmp_path, counting(asked))
    runner.on_row = lambda ok, tokens: runner.stop.set() if asked.total() >= 8 else None
    with pytest.raises(Interrupted):
        runner.run(first(runner))
    drive(set_up(tmp_path, counting(asked)))
    assert set(asked.values()) == {1} and asked.total() == ROWS
    fake.check_output(tmp_path / "out", ROWS)


def test_a_scorer_that_does_not_stop_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "DRAIN_S", 0.2)
    closed = []

    def slow(rows):
        held = list(fake.scorer(rows))
        try:
            for scored in held:
                time.sleep(0.02)
                yield scored
        finally:
            closed.append(True)

    runner = set_up(tmp_path, slow, rows=2000)
    runner.on_row = lambda ok, tokens: runner.stop.set()
    started = time.monotonic()
    with pytest.raises(Interrupted):
        runner.run(first(runner))
    assert closed and time.monotonic() - started < 10


@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_parts_are_compressed(compression, tmp_path):
    drive(set_up(tmp_path, compression=compression))
    (path,) = tmp_path.glob(f"out/parts/part-00000.jsonl.{compression}")
    whole = zstandard.ZstdDecompressor().decompressobj()
    text = {"gz": gzip.decompress, "zst": whole.decompress}[compression](path.read_bytes())
    assert [json.loads(line)["id"] for line in text.splitlines()] == [
        f"row-{n}" for n in range(ROWS) if fake.prompt_of(n) != fake.BAD
    ]


def test_parquet_parts_have_every_column_of_every_row(tmp_path):
    def scorer(rows):
        for row in rows:
            n = row.number
            values = {"a": [0.5, n / 3] if n % 2 else [], "text": row.values["prompt"]}
            yield Scored(row, values | ({"late": n} if n == 1500 else {}), 1)

    drive(set_up(tmp_path, scorer, rows=2000, output_format="parquet", rows_per_shard=5000))
    table = parquet.read_table(tmp_path / "out/parts/part-00000.parquet").to_pylist()
    assert [row["id"] for row in table] == [f"row-{n}" for n in range(2000)]
    assert table[3]["a"] == [0.5, 1.0] and table[2]["a"] == []
    assert [row["late"] for row in table if row["late"] is not None] == [1500]


def test_a_parquet_part_may_be_empty(tmp_path):
    bad = lambda rows: (Scored(row, shard.BadRow("no"), 0) for row in rows)
    drive(set_up(tmp_path, bad, output_format="parquet"))
    assert parquet.read_table(tmp_path / "out/parts/part-00000.parquet").num_rows == 0
    assert len(fake.read_lines(tmp_path / "out", "errors/*")) == ROWS


def test_a_result_that_is_no_json_is_an_error_row(tmp_path):
    odd = [{"x": float("nan")}, {"x": {1}}, {"x": 1, "id": "its own"}]
    scorer = lambda rows: (Scored(row, odd[row.number], 1) for row in rows)
    drive(set_up(tmp_path, scorer, rows=3))
    assert fake.read_lines(tmp_path / "out", "parts/*") == [{"id": "its own", "x": 1}]
    messages = [row["error"] for row in fake.read_lines(tmp_path / "out", "errors/*")]
    assert len(messages) == 2
    assert all(text.startswith("its result cannot be written as JSON: ") for text in messages)


def test_a_scorer_that_forgets_a_row_is_an_error(tmp_path):
    forgets = lambda rows: (scored for scored in fake.scorer(rows) if scored.row.number != 5)
    runner = set_up(tmp_path, forgets)
    with pytest.raises(RuntimeError, match=r"has not answered 1 rows: \['rows.jsonl:6'\]"):
        runner.run(first(runner))


def test_what_is_finished_reaches_the_store_while_the_scorer_is_busy(tmp_path):
    store = LocalStore(tmp_path)
    store.sync_interval_s = 0.01
    log = RowLog(store, "log", threading.Event())
    log.append(b"1\n")
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").read_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "log").read_bytes() == b"1\n"
    log.close()


def test_a_full_disk_is_not_lost_on_the_worker(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    store.sync_interval_s = 0.0
    log = RowLog(store, "log", threading.Event())

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._log, "append", full)
    log.append(b"1\n")
    log._thread.join(30)
    with pytest.raises(OSError, match="No space left"):
        log.append(b"2\n")
    with pytest.raises(OSError, match="No space left"):
        log.close()
