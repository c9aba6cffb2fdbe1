"""SIGTERM and SIGINT as an event, heard though the main thread is deep in XLA."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 75  # exit code: EX_TEMPFAIL, run the same command again to go on
GRACE_S = 8.0  # until the process ends, finished or not; what is finished is logged by then
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set `stop` at the first signal; at a second, or GRACE_S later, end the process. To be called
    by the main thread."""
    # Python runs handlers between two steps of the main thread, which may be minutes away; the
    # byte that announces them is written at once.
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def wait(timeout: float | None) -> bool:
        """Whether a signal comes; False when the block has ended."""
        receiver.settimeout(timeout)
        while received := receiver.recv(1):
            if received[0] in SIGNALS:
                return True
        return False

    def watch() -> None:
        if not wait(None):
            return
        stop.set()
        print(
            "Stopping: what is finished is kept, and the same command goes on from there. "
            "A second signal ends at once.", file=sys.stderr, flush=True,
        )  # fmt: skip
        try:
            if not wait(GRACE_S):
                return
        except TimeoutError:
            pass
        os._exit(INTERRUPTED)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()
        thread.join()
        receiver.close()
