"""jax's coordinator, reached through connections that were proved to be the group's.

The coordinator itself knows no keys, so it listens to its own host alone. And a process whose jax
loses the coordinator is aborted before it can say which rank was lost: here a connection that the
leader lost stays open at the follower's end.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

CHUNK = 64 * 2**10
START_S = 60.0  # for the coordinator to listen, once all ranks have come


def open_tunnel(dial: Callable[[], socket.socket]) -> str:
    """An address of this host; what connects to it is at the other end of a new `dial()`."""
    listener = socket.create_server(("127.0.0.1", 0))
    _start(_accept, listener, dial)
    return f"127.0.0.1:{listener.getsockname()[1]}"


def lead_to(peer: socket.socket, port: int) -> None:
    """Join `peer` to what listens, or soon will, on `port` of this host."""
    _start(_lead_to, peer, port)


def _accept(listener: socket.socket, dial: Callable[[], socket.socket]) -> None:
    while True:
        near, _ = listener.accept()
        try:
            far = dial()
        except Exception:  # jax tries again, and who leads is watched elsewhere
            near.close()
            continue
        _start(_pump, near, far, True)
        _start(_pump, far, near, False)


def _lead_to(peer: socket.socket, port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            near = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            if time.monotonic() > deadline:
                peer.close()
                return
            time.sleep(0.05)
    _start(_pump, peer, near, True)
    _start(_pump, near, peer, True)


def _pump(source: socket.socket, sink: socket.socket, ends_sink: bool) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK):
            sink.sendall(data)
    if ends_sink:
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _start(work: Callable, *args) -> None:
    threading.Thread(target=work, args=args, daemon=True, name="xlinfer-tunnel").start()
