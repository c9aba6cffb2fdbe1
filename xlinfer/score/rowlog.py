"""What a worker has found out about a shard so far: kept in the store against its death, and in a
temporary file for the output, which wants rows in order.

An entry is a line: the row's number, the tokens computed for it, "+" or "-" (it failed), and the
JSON of its output or error, with tabs between. A line that is not whole is as if it were not there:
its row is scored again.
"""

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from xlinfer.score.store import Log, Store

HELD_BYTES = 8 * 2**20  # of entries that are not yet in the store
POLL_S = 0.1


class Entry(NamedTuple):
    number: int
    tokens: int
    ok: bool
    data: bytes  # JSON, one line

    def line(self) -> bytes:
        return b"%d\t%d\t%s\t%s\n" % (
            self.number,
            self.tokens,
            b"+" if self.ok else b"-",
            self.data,
        )

    @staticmethod
    def parse(line: bytes) -> "Entry | None":
        """Of a line without its end; None: it is not whole."""
        number, _, rest = line.partition(b"\t")
        tokens, _, rest = rest.partition(b"\t")
        sign, _, data = rest.partition(b"\t")
        try:
            json.loads(data)
            return Entry(int(number), int(tokens), {b"+": True, b"-": False}[sign], data)
        except (ValueError, KeyError):
            return None


def logged(store: Store, folder: str) -> Iterator[Entry]:
    """What all workers on an attempt have logged; a row may be there several times."""
    for name in store.list(folder):
        if "/log" not in name.removeprefix(folder):
            continue
        try:
            for line in store.lines(name):
                entry = Entry.parse(line[:-1]) if line.endswith(b"\n") else None
                if entry is not None:
                    yield entry
        except FileNotFoundError:  # another worker has committed, and cleared up
            continue


class RowLog:
    """Writes entries to the store from a thread of its own, so that what is finished is safe
    within `store.sync_interval_s` whatever the scorer is at; at once when `stop` is set."""

    def __init__(self, store: Store, name: str, stop: threading.Event):
        self._log: Log = store.log(name)
        self._interval, self._stop = store.sync_interval_s, stop
        self._held, self._lock = bytearray(), threading.Lock()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="row-log", daemon=True)
        self._thread.start()

    def append(self, line: bytes) -> None:
        """Raises what writing an earlier one raised."""
        with self._lock:
            self._held += line
            full = len(self._held) > HELD_BYTES
        if self._failure is not None:
            raise self._failure
        if full:
            self.sync()

    def sync(self) -> None:
        """All that was appended is in the store when it returns."""
        with self._writing:
            with self._lock:
                data, self._held = bytes(self._held), bytearray()
            if data:
                self._log.append(data)

    def close(self) -> None:
        """After the last sync. Raises what writing raised."""
        self._closed.set()
        self._thread.join()
        try:
            if self._failure is not None:
                raise self._failure
            self.sync()
        finally:
            self._log.close()

    def _run(self) -> None:
        synced = time.monotonic()
        while not self._closed.wait(POLL_S):
            if time.monotonic() - synced < self._interval and not self._stop.is_set():
                continue
            try:
                self.sync()
            except BaseException as error:
                self._failure = error
                return
            synced = time.monotonic()


class Spool:
    """Entries by row number, in a temporary file: in memory are three numbers of each. All are
    added before any is read."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="xlinfer-score-")
        self._at = dict[int, tuple[int, int, bool]]()  # offset, bytes, ok
        self._end = self.tokens = self.failed = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, number: int) -> bool:
        return number in self._at

    def __len__(self) -> int:
        return len(self._at)

    def add(self, entry: Entry) -> bool:
        """The first that is added of a row counts; whether it is."""
        if entry.number in self._at:
            return False
        self._file.write(entry.data)
        self._at[entry.number] = (self._end, len(entry.data), entry.ok)
        self._end += len(entry.data)
        self.tokens += entry.tokens
        self.failed += not entry.ok
        return True

    def ordered(self, ok: bool) -> Iterator[bytes]:
        """The JSON of the rows that are answered, or of those that failed, by number."""
        for number in sorted(self._at):
            offset, size, answered = self._at[number]
            if answered == ok:
                self._file.seek(offset)
                yield self._file.read(size)
