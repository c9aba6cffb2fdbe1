"""What leading and following have in common: beats, and how a group ends."""

import logging
import os
import struct
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from xlinfer.multihost.digests import DIGEST_BYTES
from xlinfer.multihost.wire import SMALL

logger = logging.getLogger("xlinfer.multihost")

TICKS = 5  # beats in a heartbeat timeout
GRACE_S = 1.0  # a collective fails without saying why: the connection that broke may say it first
FAREWELL_S = 5.0  # for the other ranks to end before rank 0 does
DIGEST = struct.Struct(f"!Q{DIGEST_BYTES}s")  # of a call's tokens, after its number
_CODE = struct.Struct("!B")


class Beats:
    """Calls `beat()` and then `silent(rank)` for each rank that was not heard of for as long as the
    timeout. Counted in own beats, so that a process which stood still blames nobody."""

    def __init__(
        self,
        ranks: range,
        timeout_s: float,
        beat: Callable[[], None],
        silent: Callable[[int], None],
    ):
        self._unheard = dict.fromkeys(ranks, 0)
        self._every_s, self._beat, self._silent = timeout_s / TICKS, beat, silent
        self._stopped = threading.Event()
        threading.Thread(target=self._main, daemon=True, name="xlinfer-beats").start()

    def heard(self, rank: int) -> None:
        self._unheard[rank] = 0

    def stop(self) -> None:
        self._stopped.set()

    def _main(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._beat()
            for rank in self._unheard:
                self._unheard[rank] += 1
                if self._unheard[rank] >= TICKS and not self._stopped.is_set():
                    self._silent(rank)


def encode_end(code: int, reason: str) -> bytes:
    return _CODE.pack(code) + reason.encode(errors="replace")[: SMALL - 1]


def decode_end(payload: bytes) -> tuple[int, str]:
    return payload[0] if payload else 1, payload[1:].decode(errors="replace")


def first_line(error: BaseException) -> str:
    """Without a full stop, as part of a sentence."""
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__


def leave_process(code: int) -> NoReturn:
    """At once: a collective that lost a rank cannot be waited for, nor torn down."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
