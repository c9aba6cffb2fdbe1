import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.score import fake
from tests.score.objects import HttpError, Objects, store_of
from xlinfer.score import object_store, store
from xlinfer.score.job import finish, open_job, read_state, run_attempts
from xlinfer.score.object_store import status
from xlinfer.score.shard import ShardRunner
from xlinfer.score.store import LocalStore, StoreError, open_store

THREADS = 8


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(object_store, "PAUSE_S", 0.0)


def both(tmp_path):
    return LocalStore(tmp_path / "job"), store_of(Objects())


@pytest.mark.parametrize("kind", [0, 1], ids=["local", "objects"])
def test_of_many_that_create_one_name_one_wins_and_all_read_it(kind, tmp_path):
    made = both(tmp_path)[kind]
    barrier = threading.Barrier(THREADS)

    def create(number: int) -> bool:
        barrier.wait()
        return made.create("a/b.json", b"%d" % number)

    with ThreadPoolExecutor(THREADS) as pool:
        won = list(pool.map(create, range(THREADS)))
    assert sum(won) == 1 and made.read("a/b.json") == b"%d" % won.index(True)
    assert made.list("a") == ["a/b.json"]


@pytest.mark.parametrize("kind", [0, 1], ids=["local", "objects"])
def test_names_come_and_go(kind, tmp_path):
    made = both(tmp_path)[kind]
    with pytest.raises(FileNotFoundError):
        made.read("x")
    assert not made.exists("x") and made.list("folder") == []
    made.put("x", b"1")
    made.put("x", b"2")
    with made.draft("work/1/part") as path:
        path.write_bytes(b"whole")
    made.publish("work/1/part", "parts/1")
    made.remove(["work/1/part", "work/1/part"])
    made.publish("work/1/part", "parts/1")  # a late one, after another has cleared up
    assert (made.read("x"), made.read("parts/1"), made.list("work")) == (b"2", b"whole", [])
    with pytest.raises(FileNotFoundError):
        made.publish("work/2/part", "parts/2")
    log = made.log("work/3/log")
    log.append(b"a\n")
    log.append(b"b\nc")
    log.close()
    lines = [line for name in made.list("work/3") for line in made.lines(name)]
    assert lines == [b"a\n", b"b\n", b"c"]


def test_clearing_up_leaves_the_folder_that_others_make_theirs_in(tmp_path):
    made = LocalStore(tmp_path)
    made.put("work/1/worker/log", b"")
    made.remove(["work/1/worker/log"])
    assert [path.name for path in tmp_path.rglob("*")] == ["work"]


def test_a_write_whose_answer_was_lost_counts_as_ours():
    class LosesTheFirst(Objects):
        def _ask(self, call):
            result = super()._ask(call)
            if not self.failed:
                self.failed = 1
                raise HttpError(503)
            return result

    objects = LosesTheFirst()
    assert store_of(objects).create("commit", b"mine")
    assert not store_of(objects).create("commit", b"theirs")


def test_what_does_not_pass_is_raised_at_once():
    class Forbidden(Objects):
        calls = 0

        def _ask(self, call):
            self.calls += 1
            raise HttpError(403)

    objects = Forbidden()
    with pytest.raises(HttpError, match="403"):
        store_of(objects).exists("x")
    assert objects.calls == 1


def test_a_store_that_stays_away_is_an_error_after_some_tries():
    objects = Objects(failures=100)
    objects.held["bucket/job/x"] = b""
    with pytest.raises((HttpError, ConnectionError)):
        store_of(objects).read("x")
    assert objects.failed == object_store.TRIES


def test_status_of_the_clients_errors():
    botocore = type("ClientError", (Exception,), {})("slow down")
    botocore.response = {"ResponseMetadata": {"HTTPStatusCode": 503}}  # type: ignore[attr-defined]
    s3fs = OSError(16, "busy")
    s3fs.__cause__ = botocore
    assert [status(e) for e in (s3fs, HttpError(412), OSError(2, "no"))] == [503, 412, None]


@pytest.mark.parametrize("seed", range(4))
def test_a_job_on_a_store_that_lags_and_refuses(seed, tmp_path):
    """Two drivers, one after the other and together, over 503s, lost answers and old listings."""
    objects = Objects(lag=3 * seed, failures=10, seed=seed)
    source, rows = tmp_path / "rows.jsonl", 40
    fake.write_input(source, rows)

    def drive(_: int) -> None:
        made = store_of(objects)
        manifest = open_job(made, fake.job_of(source), fake.quiet)
        todo = read_state(made, manifest).todo(retry_failed=False)
        runner = ShardRunner(store=made, manifest=manifest, worker=fake.WORKER)
        run_attempts(runner, todo, lambda commit: None)
        finish(made, manifest)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(drive, range(2)))
    objects.failures = objects.lag = 0
    drive(0)  # what an old listing has left
    assert objects.failed
    for path, data in objects.held.items():
        local = tmp_path / path.removeprefix("bucket/")
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(data)
    fake.check_output(tmp_path / "job", rows)


def test_stores_without_conditional_writes_are_refused_by_name():
    with pytest.raises(StoreError, match=r"^memory://x: in memory:// no file can be created"):
        open_store("memory://x")
    with pytest.raises(StoreError, match=r"gs://bucket/x: .*gcsfs"):
        open_store("gs://bucket/x")


def test_a_file_system_without_hard_links_is_refused(monkeypatch, tmp_path):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(store.os, "link", link)
    with pytest.raises(StoreError, match="takes hard links; name another --output"):
        LocalStore(tmp_path).create("x", b"")
    assert os.listdir(tmp_path) == []
