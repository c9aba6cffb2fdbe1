"""Rank 0's end of the group: gathers the ranks, sends them every call, compares what they say."""

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import jax

from xlinfer.engine.worker import Call, Executor
from xlinfer.multihost.calls import Calls, difference
from xlinfer.multihost.channel import (
    NONCE_BYTES,
    Hello,
    Lost,
    Purpose,
    Receiver,
    Sender,
    close,
    greet,
    limit_sending,
)
from xlinfer.multihost.cluster import JOIN_S, Cluster, free_port
from xlinfer.multihost.digests import Digests
from xlinfer.multihost.member import (
    DIGEST,
    FAREWELL_S,
    GRACE_S,
    TICKS,
    Beats,
    decode_end,
    encode_end,
    first_line,
    leave_process,
    logger,
)
from xlinfer.multihost.tunnel import lead_to
from xlinfer.multihost.wire import Frame, Kind, WireError, derive
from xlinfer.programs import Sampled

STRANGERS = 64  # connections that are not proved yet


class Leader:
    """`leave(code)` ends the process; it is called at most once, from any thread, when the group
    has failed."""

    def __init__(self, cluster: Cluster, leave: Callable[[int], None] = leave_process):
        self._cluster, self._leave = cluster, leave
        self._nonce = os.urandom(NONCE_BYTES)
        self._key = derive(cluster.key, self._nonce)
        self._coordinator_port = free_port()
        self._asked_to_stop: Callable[[], None] = lambda: None
        self._listeners: list[socket.socket] = []
        self._strangers = threading.BoundedSemaphore(STRANGERS)
        self._news = threading.Condition()  # of what follows
        self._peers: dict[int, socket.socket] = {}
        self._mismatch: str | None = None  # of ranks that came
        self._facts: dict[int, Mapping[str, Any]] = {}  # by rank, of those that are ready
        self._gone: set[int] = set()  # ranks that closed their connection
        self._tokens: dict[int, dict[int, bytes]] = {}  # digests by call, by rank
        self._unanswered: dict[int, int] = {}  # call that rank 0 has the tokens of -> ticks since
        self._ending = False
        self._farewell = threading.Event()  # was said
        self._sender: Sender | None = None
        self._beats: Beats | None = None

    @property
    def coordinator(self) -> str:
        """jax's, which only this host reaches."""
        return f"127.0.0.1:{self._coordinator_port}"

    @property
    def _others(self) -> range:
        return range(1, self._cluster.num_processes)

    def gather(self, timeout_s: float = JOIN_S) -> None:
        """Wait for all ranks. Raises OSError when it cannot listen, ValueError when a rank does not
        come or was started for another group."""
        cluster = self._cluster
        family = socket.AF_INET6 if ":" in cluster.bind else socket.AF_INET
        try:
            listener = socket.create_server((cluster.bind, cluster.port), family=family)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"Rank 0 cannot listen on {cluster.bind}:{cluster.port}: {reason}. Choose another "
                "port in --coordinator_address on every host, or name an address of this host in "
                "--coordinator_bind_address."
            ) from None
        self._listeners.append(listener)
        _thread("accept", self._accept, listener)
        deadline = monotonic() + timeout_s
        with self._news:
            while missing := [str(rank) for rank in self._others if rank not in self._peers]:
                if self._mismatch is not None:
                    raise ValueError(self._mismatch)
                if not self._news.wait(deadline - monotonic()):
                    raise ValueError(
                        f"Of {cluster.num_processes} processes, rank {', '.join(missing)} did not "
                        f"come to {cluster.host}:{cluster.port} within {timeout_s:.0f} s. Run the "
                        "same command on every host; where there is a plan_key_file, the same one."
                    )
        for peer in self._peers.values():
            limit_sending(peer, cluster.heartbeat_timeout_s)
        self._sender = Sender(self._peers, self._key, 0)
        self._beats = Beats(
            self._others, cluster.heartbeat_timeout_s, self._beat, self._not_heard_of
        )
        for rank, peer in self._peers.items():
            _thread(f"rank-{rank}", self._hear, rank, Receiver(peer, self._key, rank))

    def when_asked_to_stop(self, callback: Callable[[], None]) -> None:
        """`callback()` when another rank was, from any thread."""
        self._asked_to_stop = callback

    def lead(self, worker: Executor, calls: Calls, facts: Mapping[str, Any]) -> "Leading":
        """Runs calls on every rank, once all are ready and have the same `facts`. Raises ValueError
        for one that has not."""
        with self._news:
            self._news.wait_for(lambda: len(self._facts) == len(self._others))
        for rank, theirs in sorted(self._facts.items()):
            if (what := difference(facts, theirs)) is not None:
                raise ValueError(f"Rank {rank} has another model, version or flags: {what}.")
        return Leading(self, worker, calls)

    def send(self, kind: Kind, payload: bytes, program: bytes) -> None:
        assert self._sender is not None
        for rank in self._sender.send(kind, payload, program):
            self.fail(f"rank {rank} was lost: nothing can be sent to it")

    def end(self, code: int, reason: str) -> int:
        """The group ends as it should, or could not start. Returns when the others have ended, or
        should have: the code to exit with, which is 1 where the group has failed meanwhile."""
        with self._news:
            first, self._ending = not self._ending, True
        if not first:
            self._farewell.wait()
            return 1
        self._say_farewell(code, reason)
        return code

    def fail(self, reason: str) -> None:
        """All ranks end, this one too."""
        with self._news:
            if self._ending:
                return
            self._ending = True
        logger.error("All ranks end: %s.", reason)
        _thread(
            "end", self._leave_after_farewell, reason
        )  # who calls may be who must go on hearing

    def _leave_after_farewell(self, reason: str) -> None:
        self._say_farewell(1, reason)
        self._leave(1)

    def broke(self, error: Exception) -> None:
        """A program failed here."""
        threading.Event().wait(GRACE_S)
        self.fail(f"rank 0 could not run a program: {first_line(error)}")

    def sampled(self, number: int, rank: int, digest: bytes) -> None:
        """What `rank` has of the tokens of call `number`."""
        with self._news:
            told = self._tokens.setdefault(number, {})
            told[rank] = digest
            if rank == 0:
                self._unanswered[number] = 0
            if len(told) == self._cluster.num_processes:
                del self._tokens[number], self._unanswered[number]
            other = [r for r, d in told.items() if 0 in told and d != told[0]]
        if other:
            self.fail(f"rank {other[0]} sampled other tokens in call {number} than rank 0")

    def _say_farewell(self, code: int, reason: str) -> None:
        if self._sender is not None and self._beats is not None:
            self._beats.stop()
            for rank in self._sender.send(Kind.END, encode_end(code, reason)):
                self._heard_the_last_of(rank)
            with self._news:
                self._news.wait_for(lambda: self._gone.issuperset(self._others), FAREWELL_S)
        for one in (*self._listeners, *self._peers.values()):
            close(one)
        self._farewell.set()

    def _heard_the_last_of(self, rank: int) -> None:
        with self._news:
            self._gone.add(rank)
            self._news.notify_all()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, address = listener.accept()
            except OSError:  # it is closed
                return
            self._strangers.acquire()
            _thread("greet", self._greet, peer, address[0])

    def _greet(self, peer: socket.socket, address: str) -> None:
        try:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = greet(peer, self._cluster.key, self._nonce)
            if hello.purpose == Purpose.TUNNEL:
                lead_to(peer, self._coordinator_port)
            else:
                self._admit(peer, hello)
        except (WireError, Lost, OSError) as error:
            logger.warning("A connection from %s was refused: %s.", address, error)
            close(peer)
        finally:
            self._strangers.release()

    def _admit(self, peer: socket.socket, hello: Hello) -> None:
        mine = self._cluster.num_processes
        with self._news:
            if hello.num_processes != mine:
                self._mismatch = (
                    f"Rank {hello.rank} was started with num_processes={hello.num_processes}, and "
                    f"rank 0 with {mine}. Run the same command on every host."
                )
                self._news.notify_all()
                raise WireError("it belongs to another group")
            if hello.rank not in self._others or hello.rank in self._peers:
                raise WireError(f"rank {hello.rank} is not awaited")
            self._peers[hello.rank] = peer
            self._news.notify_all()

    def _hear(self, rank: int, receiver: Receiver) -> None:
        assert self._beats is not None
        try:
            while True:
                frame = receiver.receive(_no_call)
                self._beats.heard(rank)
                self._obey(rank, frame)
        except Lost as error:
            self._heard_the_last_of(rank)
            self.fail(f"rank {rank} was lost: {error}")
        except WireError as error:
            self._heard_the_last_of(rank)
            self.fail(f"rank {rank} sent what is no frame of this group: {error}")

    def _obey(self, rank: int, frame: Frame) -> None:
        match frame.kind:
            case Kind.BEAT:
                pass
            case Kind.READY:
                with self._news:
                    self._facts[rank] = _object(frame.payload)
                    self._news.notify_all()
            case Kind.DIGEST if len(frame.payload) == DIGEST.size:
                number, digest = DIGEST.unpack(frame.payload)
                self.sampled(number, rank, digest)
            case Kind.LEAVE:
                logger.info("Rank %d was asked to stop.", rank)
                self._asked_to_stop()
            case Kind.END:
                self.fail(decode_end(frame.payload)[1])
            case kind:
                raise WireError(f"a {kind.name} of {len(frame.payload)} bytes")

    def _beat(self) -> None:
        self.send(Kind.BEAT, b"", bytes(16))
        with self._news:
            for number in self._unanswered:
                self._unanswered[number] += 1
            late = [number for number, ticks in self._unanswered.items() if ticks > TICKS]
            told = self._tokens[late[0]] if late else {}
            ranks = [rank for rank in self._others if rank not in told]
        if late:
            self.fail(
                f"rank {ranks[0]} has no tokens of call {late[0]}, which rank 0 had "
                f"{self._cluster.heartbeat_timeout_s:g} s ago"
            )

    def _not_heard_of(self, rank: int) -> None:
        seconds = self._cluster.heartbeat_timeout_s
        self._heard_the_last_of(rank)
        self.fail(f"rank {rank} was lost: nothing was heard of it for {seconds:g} s")


class Leading:
    """An Executor: what it runs here, every other rank runs too."""

    def __init__(self, leader: Leader, worker: Executor, calls: Calls):
        self._leader, self._worker, self._calls = leader, worker, calls
        self._number = 0  # of the next call
        found = lambda number, digest: leader.sampled(number, 0, digest)
        self._digests = Digests(found, leader.broke)

    @property
    def params(self) -> tuple[jax.Array, ...]:
        return self._worker.params

    def replace_params(self, params: tuple[jax.Array, ...]) -> None:
        raise ValueError(
            "The weights of a model that several hosts serve cannot be updated: the other hosts "
            "would keep theirs. Start the server again with the new weights."
        )

    def run(self, call: Call) -> Any:
        """The others are told first, so that they begin while this host does."""
        digest, payload = self._calls.encode(call)
        self._leader.send(Kind.CALL, payload, digest)
        try:
            result = self._worker.run(call)
        except Exception as error:
            self._leader.broke(error)
            raise
        if isinstance(result, Sampled):
            self._digests.put(self._number, result)
        self._number += 1
        return result


def _no_call(program: bytes) -> int:
    raise WireError("it sent a CALL, as only rank 0 may")


def _object(payload: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(payload)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise WireError("its READY is not JSON")
    return found


def _thread(name: str, work: Callable, *args) -> None:
    threading.Thread(target=work, args=args, daemon=True, name=f"xlinfer-{name}").start()
