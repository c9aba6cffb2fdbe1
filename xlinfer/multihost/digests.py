"""Digests of sampled tokens, taken when the device has them and away from the thread that fills
it. Also how a process ends without waiting for a device that may never answer."""

import hashlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from xlinfer.programs import Sampled

DIGEST_BYTES = 8


class Digests:
    """`found(number, digest)` for every result that was put, in its order; `failed(error)` once
    where the device has none, and nothing after it. Both are called from a thread of its own."""

    def __init__(self, found: Callable[[int, bytes], None], failed: Callable[[Exception], None]):
        self._found, self._failed = found, failed
        self._results: queue.SimpleQueue[tuple[int, Sampled] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, daemon=True, name="xlinfer-digests")
        self._thread.start()

    def put(self, number: int, sampled: Sampled) -> None:
        self._results.put((number, sampled))

    def finish(self) -> None:
        """Wait until all that was put has been found."""
        self._results.put(None)
        self._thread.join()

    def _main(self) -> None:
        try:
            while (result := self._results.get()) is not None:
                number, sampled = result
                self._found(number, digest_of(sampled))
        except Exception as error:
            self._failed(error)


def digest_of(sampled: Sampled) -> bytes:
    """Waits for the device."""
    tokens, counts = np.asarray(sampled.token_WR), np.asarray(sampled.count_R)
    data = tokens.tobytes() + counts.tobytes()
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def leave_process(code: int) -> NoReturn:
    """At once: a collective that lost a rank cannot be waited for, nor torn down."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
