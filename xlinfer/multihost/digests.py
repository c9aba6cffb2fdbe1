"""Digests of sampled tokens, taken when the device has them and away from the thread that fills
it."""

import hashlib
import queue
import threading
from collections.abc import Callable

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
