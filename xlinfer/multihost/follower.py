"""Another rank's end of the group: does what rank 0 says, and says what tokens came of it."""

import json
import queue
import socket
import threading
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any

from xlinfer.engine.worker import Call, Executor
from xlinfer.multihost.calls import Calls
from xlinfer.multihost.channel import (
    Hello,
    Lost,
    Purpose,
    Receiver,
    Sender,
    dial,
    introduce,
    limit_sending,
)
from xlinfer.multihost.cluster import JOIN_S, Cluster
from xlinfer.multihost.digests import Digests
from xlinfer.multihost.member import (
    DIGEST,
    GRACE_S,
    Beats,
    decode_end,
    encode_end,
    first_line,
    leave_process,
    logger,
)
from xlinfer.multihost.tunnel import open_tunnel
from xlinfer.multihost.wire import Frame, Kind, WireError, derive
from xlinfer.programs import Sampled

AGAIN_S = 0.5  # between two tries to reach rank 0


class Follower:
    """`leave(code)` ends the process; it is called at most once, from any thread: when the group
    has failed, or ends before this rank follows. `code` is what to exit with otherwise."""

    def __init__(self, cluster: Cluster, leave: Callable[[int], None] = leave_process):
        self._cluster, self._leave = cluster, leave
        self._lock, self._ending = threading.Lock(), False
        self._calls: Calls | None = None
        self._plans: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._sender: Sender | None = None
        self._beats: Beats | None = None
        self.code = 0
        self.following = False  # ready, and told what to do

    def connect(self, timeout_s: float = JOIN_S) -> None:
        """Raises OSError when rank 0 cannot be reached or does not take this rank."""
        cluster, deadline = self._cluster, monotonic() + timeout_s
        while True:
            try:
                peer, nonce = self._dial(Purpose.PLANS)
                break
            except (OSError, Lost) as error:
                if monotonic() > deadline:
                    raise OSError(
                        f"Rank {cluster.process_id} cannot reach rank 0 at "
                        f"{cluster.host}:{cluster.port}: {error}. Is it running, and does it use "
                        "the same plan_key_file?"
                    ) from None
                sleep(AGAIN_S)
            except WireError as error:
                raise OSError(
                    f"Rank 0 at {cluster.host}:{cluster.port} is not of this group: {error}"
                ) from None
        limit_sending(peer, cluster.heartbeat_timeout_s)
        key = derive(cluster.key, nonce)
        self._sender = Sender({0: peer}, key, cluster.process_id)
        self._beats = Beats(
            range(1), cluster.heartbeat_timeout_s, lambda: self._send(Kind.BEAT), self._not_heard_of
        )
        hear = threading.Thread(
            target=self._hear, args=(Receiver(peer, key, 0),), daemon=True, name="xlinfer-rank-0"
        )
        hear.start()

    def open_coordinator(self) -> str:
        """An address of this host, behind which is jax's coordinator."""
        return open_tunnel(lambda: self._dial(Purpose.TUNNEL)[0])

    def follow(self, worker: Executor, calls: Calls, facts: Mapping[str, Any]) -> None:
        """Run what rank 0 says until it says that the group ends."""
        self._calls = calls
        self._send(Kind.READY, json.dumps(facts).encode())
        found = lambda number, digest: self._send(Kind.DIGEST, DIGEST.pack(number, digest))
        digests, number = Digests(found, self._broke), 0
        self.following = True
        while (call := self._plans.get()) is not None:
            try:
                result = worker.run(call)
            except Exception as error:
                self._broke(error)
                return
            if isinstance(result, Sampled):
                for array in (result.token_WR, result.count_R):
                    array.copy_to_host_async()
                digests.put(number, result)
            number += 1
        digests.finish()
        self._close()

    def ask_to_stop(self) -> None:
        """This process was told to stop: rank 0 ends the group when its answers are done. Without
        a rank 0 yet, it leaves."""
        if self._sender is None:
            self._end(0)
        else:
            self._send(Kind.LEAVE)

    def fail(self, reason: str) -> None:
        """All ranks end, this one too."""
        if self._begin_to_end(1):
            logger.error("All ranks end: %s.", reason)
            if self._sender is not None:
                self._sender.send(Kind.END, encode_end(1, reason))
            self._end(1)

    def _end(self, code: int) -> None:
        self._close()
        self._leave(code)

    def _close(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def _begin_to_end(self, code: int) -> bool:
        """Whether nothing else did."""
        with self._lock:
            if self._ending:
                return False
            self._ending, self.code = True, code
        if self._beats is not None:
            self._beats.stop()
        self._plans.put(None)
        return True

    def _broke(self, error: Exception) -> None:
        threading.Event().wait(GRACE_S)
        self.fail(f"rank {self._cluster.process_id} could not run a program: {first_line(error)}")

    def _dial(self, purpose: Purpose) -> tuple[socket.socket, bytes]:
        cluster = self._cluster
        peer = dial(cluster.host, cluster.port, cluster.heartbeat_timeout_s)
        hello = Hello(purpose=purpose, rank=cluster.process_id, num_processes=cluster.num_processes)
        try:
            return peer, introduce(peer, cluster.key, hello)
        except BaseException:
            peer.close()
            raise

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        assert self._sender is not None
        if self._sender.send(kind, payload):
            self._lost("nothing can be sent to it")

    def _hear(self, receiver: Receiver) -> None:
        assert self._beats is not None
        try:
            while True:
                frame = receiver.receive(self._longest)
                self._beats.heard(0)
                self._obey(frame)
        except Lost as error:
            self._lost(str(error))
        except WireError as error:
            self.fail(f"rank 0 sent what is no frame of this group: {error}")

    def _longest(self, program: bytes) -> int:
        if self._calls is None:
            raise WireError("it sent a CALL before this rank was ready")
        return self._calls.longest(program)

    def _obey(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.BEAT:
                pass
            case Kind.CALL:
                assert self._calls is not None
                self._plans.put(self._calls.decode(frame.program, frame.payload))
            case Kind.END:
                code, reason = decode_end(frame.payload)
                if code == 0:
                    self._begin_to_end(0)
                    if not self.following:
                        self._end(0)
                elif self._begin_to_end(code):
                    logger.error("All ranks end: %s.", reason)
                    self._end(code)
            case kind:
                raise WireError(f"a {kind.name}")

    def _lost(self, how: str) -> None:
        self.fail(f"rank 0 was lost: {how}")

    def _not_heard_of(self, rank: int) -> None:
        self._lost(f"nothing was heard of it for {self._cluster.heartbeat_timeout_s:g} s")
