"""A group's rules, with ranks in threads of this process and no device."""

import contextlib
import queue
import socket
import threading
import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from xlinfer.engine.worker import Call
from xlinfer.multihost.channel import Hello, Purpose, close, dial, greet, introduce
from xlinfer.multihost.cluster import Cluster, cluster_of, free_port
from xlinfer.multihost.follower import Follower
from xlinfer.multihost.leader import Leader
from xlinfer.multihost.wire import NO_PROGRAM, Frame, Kind, WireError, derive, encode
from xlinfer.programs import Sampled

KEY = b"k" * 32
FACTS = {"xlinfer": "1", "plan.num_pages": 100}
TIMEOUT_S = 1.0


class Doubler:
    """Stands for a Worker: the tokens of a call are twice its input."""

    params = ()

    def __init__(self, factor: int = 2, slow_s: float = 0.0):
        self.seen: list[int] = []
        self._factor, self._slow_s = factor, slow_s

    def run(self, call: Call) -> Any:
        value = int(call.inputs[0][0])
        self.seen.append(value)
        time.sleep(self._slow_s)
        if value < 0:
            raise RuntimeError("the device is gone\nwith a trace")
        token_WR = HostArray([[value * self._factor]])
        return Sampled(token_WR, HostArray([1]), None)  # type: ignore[arg-type]

    def replace_params(self, params) -> None:
        raise AssertionError


class HostArray(np.ndarray):
    """numpy's, with what a jax array has beside."""

    def __new__(cls, values):
        return np.array(values, np.int32).view(cls)

    def copy_to_host_async(self) -> None:
        pass


class OneProgram:
    """Stands for Calls: one program, of two integers."""

    digest = b"p" * 16

    def encode(self, call: Call) -> tuple[bytes, bytes]:
        return self.digest, call.inputs[0].tobytes()

    def decode(self, digest: bytes, payload: bytes) -> Call:
        return Call("decode", 1, (np.frombuffer(payload, np.int64),))

    def longest(self, digest: bytes) -> int:
        if digest != self.digest:
            raise WireError("it runs another program")
        return 8


class Rank(NamedTuple):
    follower: Follower
    thread: threading.Thread
    left: "queue.Queue[int]"


class Group:
    """Of a Leader, Followers in threads, and whom else a test sends."""

    def __init__(self, num_processes: int = 2, key: bytes = KEY):
        self.ranks: list[Rank] = []
        self.intruders: list[tuple[socket.socket, bytes]] = []  # and the group's key
        self.cluster = Cluster(
            host="127.0.0.1", port=free_port(), bind="127.0.0.1", num_processes=num_processes,
            process_id=0, key=key, heartbeat_timeout_s=TIMEOUT_S,
        )  # fmt: skip
        self.left: queue.Queue[int] = queue.Queue()
        self.leader = Leader(self.cluster, self.left.put)

    def rank(self, n: int, worker: Doubler, facts=FACTS, **changes) -> Rank:
        left: queue.Queue[int] = queue.Queue()
        follower = Follower(replace(self.cluster, process_id=n, **changes), left.put)

        def work() -> None:
            with contextlib.suppress(OSError):
                follower.connect(timeout_s=5)
                follower.follow(worker, OneProgram(), facts)  # type: ignore[arg-type]

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.ranks.append(Rank(follower, thread, left))
        return self.ranks[-1]

    def lead(self, worker: Doubler):
        self.leader.gather(timeout_s=10)
        return self.leader.lead(worker, OneProgram(), FACTS)  # type: ignore[arg-type]

    def intrude(self) -> None:
        """Rank 1 is somebody who has the key, and says nothing more."""

        def work() -> None:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    peer = dial("127.0.0.1", self.cluster.port, 5)
                    processes = self.cluster.num_processes
                    hello = Hello(purpose=Purpose.PLANS, rank=1, num_processes=processes)
                    nonce = introduce(peer, KEY, hello)
                    self.intruders.append((peer, derive(KEY, nonce)))
                    return
                time.sleep(0.01)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.leader.gather(timeout_s=10)
        thread.join()

    def close(self) -> None:
        for peer, _ in self.intruders:
            close(peer)
        self.leader.end(0, "")
        for rank in self.ranks:
            rank.follower.fail("the test is over")
            rank.thread.join(1)


@pytest.fixture
def group_of():
    """`group_of(num_processes, key)`; nothing of it is left behind."""
    made: list[Group] = []

    def make(num_processes: int = 2, key: bytes = KEY) -> Group:
        made.append(Group(num_processes, key))
        return made[-1]

    yield make
    for group in made:
        group.close()


def call(value: int) -> Call:
    return Call("decode", 1, (np.array([value], np.int64),))


def said(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_every_rank_runs_every_call_in_order_and_all_end_together(group_of):
    group, workers = group_of(3), [Doubler(), Doubler(), Doubler()]
    ranks = [group.rank(n, workers[n]) for n in (1, 2)]
    leading = group.lead(workers[0])
    for value in range(50):
        assert leading.run(call(value)).token_WR[0, 0] == 2 * value
    group.leader.end(0, "")
    for rank in ranks:
        rank.thread.join(5)
        assert not rank.thread.is_alive()
    assert [worker.seen for worker in workers] == [list(range(50))] * 3
    assert group.left.empty() and all(rank.left.empty() for rank in ranks)


def test_a_rank_with_other_tokens_ends_all(group_of, caplog):
    group = group_of(3)
    ranks = [group.rank(1, Doubler()), group.rank(2, Doubler(factor=3))]
    leading = group.lead(Doubler())
    for value in (0, 1):  # the first is the same for all
        leading.run(call(value))
    assert group.left.get(timeout=5) == 1
    assert [rank.left.get(timeout=5) for rank in ranks] == [1, 1]
    line = "All ranks end: rank 2 sampled other tokens in call 1 than rank 0."
    assert said(caplog).count(line) == 3


def test_a_rank_whose_device_fails_ends_all(group_of, caplog):
    group, worker = group_of(), Doubler()
    rank = group.rank(1, worker)
    leading = group.lead(Doubler())
    worker._factor = None  # type: ignore[assignment]
    leading.run(call(1))
    assert group.left.get(timeout=5) == rank.left.get(timeout=5) == 1
    assert "All ranks end: rank 1 could not run a program: unsupported operand" in said(caplog)


def test_rank_0s_own_failure_ends_all(group_of, caplog):
    group = group_of()
    rank = group.rank(1, Doubler())
    leading = group.lead(Doubler())
    with pytest.raises(RuntimeError):
        leading.run(call(-1))
    assert rank.left.get(timeout=5) == group.left.get(timeout=5) == 1
    assert "could not run a program: the device is gone." in said(caplog)


def test_a_rank_without_tokens_in_time_ends_all(group_of, caplog):
    group = group_of()
    group.rank(1, Doubler(slow_s=60))
    leading = group.lead(Doubler())
    leading.run(call(1))
    assert group.left.get(timeout=10 * TIMEOUT_S) == 1
    assert "rank 1 has no tokens of call 0, which rank 0 had 1 s ago" in said(caplog)


def test_a_silent_rank_is_lost_within_the_timeout(group_of, caplog):
    group = group_of()
    group.intrude()
    started = time.monotonic()
    assert group.left.get(timeout=5) == 1
    assert time.monotonic() - started < 2 * TIMEOUT_S
    assert "rank 1 was lost: nothing was heard of it for 1 s" in said(caplog)


def test_a_rank_whose_connection_closes_is_lost_at_once(group_of, caplog):
    group = group_of(3)
    rank = group.rank(2, Doubler())
    group.intrude()
    close(group.intruders[0][0])
    assert group.left.get(timeout=5) == rank.left.get(timeout=5) == 1
    assert said(caplog).count("All ranks end: rank 1 was lost: its connection closed.") == 2


def test_a_lost_leader_ends_a_follower(group_of, caplog):
    group = group_of()
    with socket.create_server(("127.0.0.1", group.cluster.port)) as listener:
        rank = group.rank(1, Doubler())
        with listener.accept()[0] as peer:
            greet(peer, KEY, b"n" * 32)
    assert rank.left.get(timeout=5) == 1
    assert "All ranks end: rank 0 was lost: " in said(caplog)


BEAT = Frame(Kind.BEAT, NO_PROGRAM, b"")
WRONG = {
    "wrong bytes": (lambda key: b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n" * 3, "protocol"),
    "wrong HMAC": (lambda key: encode(b"another key", 1, 0, BEAT), "HMAC of its BEAT is wrong"),
    "wrong number": (lambda key: encode(key, 1, 7, BEAT), "number 7 of rank 1; due is number 0"),
    "a frame twice": (lambda key: 2 * encode(key, 1, 0, BEAT), "rank 1; due is number 1"),
    "another's rank": (lambda key: encode(key, 2, 0, BEAT), "number 0 of rank 2; due is"),
    "a call": (lambda key: encode(key, 1, 0, Frame(Kind.CALL, NO_PROGRAM, b"")), "only rank 0 may"),
    "too much": (
        lambda key: encode(key, 1, 0, Frame(Kind.READY, NO_PROGRAM, bytes(2**17))),
        "READY of 131072 bytes; it may have 65536",
    ),
    "no JSON": (lambda key: encode(key, 1, 0, Frame(Kind.READY, NO_PROGRAM, b"\x80\x04")), "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_rank_that_sends_what_it_should_not_ends_all(group_of, name, caplog):
    make, words = WRONG[name]
    group = group_of()
    group.intrude()
    peer, key = group.intruders[0]
    peer.sendall(make(key))
    peer.shutdown(socket.SHUT_WR)
    assert group.left.get(timeout=10) == 1
    assert "rank 1 sent what is no frame of this group: " in said(caplog) and words in said(caplog)


def test_who_has_not_the_key_is_refused_and_does_no_harm(group_of, caplog):
    group = group_of()
    rank = group.rank(1, Doubler(), key=b"x" * 32)
    with pytest.raises(ValueError, match=r"rank 1 did not come to 127\.0\.0\.1:\d+ within 1 s"):
        group.leader.gather(timeout_s=1)
    assert "A connection from 127.0.0.1 was refused: the HMAC of its HELLO is wrong." in said(
        caplog
    )
    with pytest.raises(OSError, match="does it use the same plan_key_file"):
        rank.follower.connect(timeout_s=0)


def test_a_stranger_at_the_port_does_no_harm(group_of, caplog):
    group = group_of()

    def knock() -> None:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                with socket.create_connection(("127.0.0.1", group.cluster.port)) as peer:
                    peer.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
                    peer.recv(100)
                group.rank(1, Doubler())
                return

    threading.Thread(target=knock, daemon=True).start()
    leading = group.lead(Doubler())
    leading.run(call(4))
    group.leader.end(0, "")
    assert "refused: it does not speak xlinfer's protocol" in said(caplog)


def test_without_a_key_the_group_agrees_on_one(group_of):
    group = group_of(key=b"")
    rank = group.rank(1, Doubler())
    leading = group.lead(Doubler())
    leading.run(call(4))
    group.leader.end(0, "")
    rank.thread.join(5)
    assert rank.left.empty() and group.left.empty()


def test_ranks_that_differ_are_refused_by_what_differs(group_of):
    group = group_of()
    group.rank(1, Doubler(), FACTS | {"plan.num_pages": 50})
    words = "Rank 1 has another model, version or flags: plan.num_pages is 50, and here 100"
    with pytest.raises(ValueError, match=words):
        group.lead(Doubler())


def test_a_rank_of_another_count_is_refused(group_of):
    group = group_of()
    group.rank(1, Doubler(), num_processes=4)
    with pytest.raises(ValueError, match="Rank 1 was started with num_processes=4, and rank 0 wi"):
        group.leader.gather(timeout_s=10)


def test_weights_are_not_updated_on_one_host_alone(group_of):
    group = group_of()
    group.rank(1, Doubler())
    with pytest.raises(ValueError, match="cannot be updated: the other hosts would keep theirs"):
        group.lead(Doubler()).replace_params(())
    group.leader.end(0, "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator_address": "h:1", "num_processes": 2}, "--process_id must be given"),
        ({"process_id": 0}, "--coordinator_address and --num_processes must be given"),
        ({"coordinator_address": "h", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator_address": "h:1", "num_processes": 1, "process_id": 0}, "leave it out"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "below 2"),
    ],
)
def test_a_half_described_cluster_is_refused(given, words):
    none = dict.fromkeys(("coordinator_address", "num_processes", "process_id"))
    with pytest.raises(ValueError, match=words):
        cluster_of(
            **{**none, **given}, coordinator_bind_address=None, key=b"", heartbeat_timeout_s=1
        )


def test_slurm_describes_its_cluster(monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "70001", "SLURM_STEP_NODELIST": "node[3-5]", "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    }  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    cluster = cluster_of(
        coordinator_address=None, coordinator_bind_address=None, num_processes=None,
        process_id=None, key=b"", heartbeat_timeout_s=1,
    )  # fmt: skip
    assert (cluster.host, cluster.num_processes, cluster.process_id) == ("node3", 3, 2)
