"""One worker on one attempt: rows from the reader, through the scorer, into the log, committed.

Any number of workers may be on the same attempt; `layout` says why only one counts.
"""

import itertools
import json
import math
import os
import re
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from xlinfer.score.layout import Attempt
from xlinfer.score.manifest import Manifest
from xlinfer.score.parts import digest_of, suffix_of, write_lines, write_part
from xlinfer.score.readers import Place, Reader
from xlinfer.score.rowlog import Entry, RowLog, Spool, logged
from xlinfer.score.rows import BadRow, Row, Scored, Scorer
from xlinfer.score.store import Store

JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
MOST_FAILURES = 20  # messages of a commit
DRAIN_S = 5.0  # after a stop, in which what the scorer has begun may finish

# Called when a row is in the log's hands, and at each step of an attempt's end: "row", "logged",
# "drafted", "committed", "published", "cleared". Tests stop a worker there.
Step = Callable[[str], None]
OnRow = Callable[[bool, int], None]  # ok, tokens


class Interrupted(Exception):
    """The worker was told to stop; what it had finished is in the log."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What scores, and what it runs on."""

    scorer: Scorer
    device: str
    roofline_tokens_per_s: float | None  # the most that its devices could compute; None: unknown


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What an attempt came to. Seconds, `scored` and `scored_tokens` are the winner's own: what it
    found in logs was another's."""

    drafts: str  # the folder that holds the attempt's part and errors until they are published
    rows: int  # answered
    failed: int
    tokens: int  # computed for all of them
    sha256: str  # of the part
    device: str
    roofline_tokens_per_s: float | None
    scored: int
    scored_tokens: int
    started: float  # seconds since 1970
    ended: float
    reading_s: float  # the scorer waited for rows
    scoring_s: float
    writing_s: float
    failures: dict[str, int]  # message -> rows, the commonest

    @staticmethod
    def read(store: Store, attempt: Attempt) -> "Commit":
        """Raises FileNotFoundError."""
        return Commit(**json.loads(store.read(attempt.commit)))


@dataclass(kw_only=True)
class ShardRunner:
    """One worker's way through the attempts that it is given."""

    store: Store
    manifest: Manifest
    worker: Worker
    stop: threading.Event = field(default_factory=threading.Event)
    on_row: OnRow = lambda ok, tokens: None
    step: Step = lambda name: None

    def __post_init__(self) -> None:
        self._reader = Reader(self.manifest.job)
        host = re.sub(r"[^\w.-]", "_", socket.gethostname())
        self._name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._runs = itertools.count()

    def run(self, attempt: Attempt) -> Commit:
        """The attempt's commit, which may be another worker's. Raises Interrupted; InputError or
        StoreError for what stands in the done."""
        if not self.store.exists(attempt.commit):
            try:
                self._score(attempt, f"{attempt.work}/{self._name}-{next(self._runs)}")
            except FileNotFoundError:
                # Another worker has committed meanwhile, and cleared up under our feet.
                if not self.store.exists(attempt.commit):
                    raise
            self.step("committed")
        commit = Commit.read(self.store, attempt)
        publish(self.store, self.manifest, attempt, commit)
        self.step("published")
        self.store.remove(self.store.list(attempt.work))
        self.step("cleared")
        return commit

    def _score(self, attempt: Attempt, drafts: str) -> None:
        started, clock = time.time(), time.perf_counter()
        wanted = self._wanted(attempt)
        with Spool() as spool:
            for entry in logged(self.store, attempt.work):
                if spool.add(entry):
                    self.on_row(entry.ok, 0)
            log = RowLog(self.store, f"{drafts}/log", self.stop)
            with closing(log):
                done = _Pass(spool=spool, log=log, on_row=self.on_row, step=self.step)
                rows = (found for found in self._reader.rows(attempt.shard) if wanted(found[1]))
                done.go(self.worker.scorer, rows, self.stop)
            self.step("logged")
            writing = time.perf_counter()
            with self.store.draft(f"{drafts}/part") as path:
                write_part(path, self.manifest.job, lambda: spool.ordered(ok=True))
                sha256 = digest_of(path)
            if spool.failed:
                with self.store.draft(f"{drafts}/errors") as path, path.open("wb") as file:
                    write_lines(file, spool.ordered(ok=False))
            self.step("drafted")
            now = time.perf_counter()
            done.writing_s += now - writing
            commit = Commit(
                drafts=drafts,
                rows=len(spool) - spool.failed,
                failed=spool.failed,
                tokens=spool.tokens,
                sha256=sha256,
                device=self.worker.device,
                roofline_tokens_per_s=self.worker.roofline_tokens_per_s,
                scored=done.scored,
                scored_tokens=done.tokens,
                started=started,
                ended=time.time(),
                reading_s=done.reading_s,
                scoring_s=now - clock - done.reading_s - done.writing_s,
                writing_s=done.writing_s,
                failures=_commonest(spool),
            )
        self.store.create(attempt.commit, json.dumps(asdict(commit)).encode())

    def _wanted(self, attempt: Attempt) -> Callable[[Row | Scored], bool]:
        """Whether a row of the shard is one of the attempt's."""
        if not attempt.number:
            return lambda row: True
        failed = {json.loads(line)["number"] for line in self.store.lines(attempt.before.errors)}
        return lambda row: (row.row if isinstance(row, Scored) else row).number in failed


def publish(store: Store, manifest: Manifest, attempt: Attempt, commit: Commit) -> None:
    """Show what the commit names; again does no harm."""
    store.publish(f"{commit.drafts}/part", attempt.part(suffix_of(manifest.job)))
    if commit.failed:
        store.publish(f"{commit.drafts}/errors", attempt.errors)


@dataclass(kw_only=True)
class _Pass:
    """Of an attempt's rows through the scorer and into the log."""

    spool: Spool
    log: RowLog
    on_row: OnRow
    step: Step
    scored: int = 0
    tokens: int = 0
    reading_s: float = 0.0
    writing_s: float = 0.0
    pending: dict[int, Place] = field(default_factory=dict)  # row number -> of a row at the scorer

    def go(
        self, scorer: Scorer, rows: Iterator[tuple[Place, Row | Scored]], stop: threading.Event
    ) -> None:
        """Raises Interrupted if rows are left over when `stop` is set."""
        last = math.inf
        results = scorer(self._feed(rows, stop))
        try:
            for scored in results:
                self._record(self.pending.pop(scored.row.number), scored)
                if stop.is_set():
                    last = min(last, time.monotonic() + DRAIN_S)
                    if time.monotonic() > last:
                        break
        finally:
            if isinstance(results, Generator):
                results.close()
        if stop.is_set() and (self.pending or next(rows, None) is not None):
            raise Interrupted
        if self.pending:
            places = [str(place) for place in self.pending.values()]
            raise RuntimeError(f"the scorer has not answered {len(places)} rows: {places[:3]}")

    def _feed(
        self, rows: Iterator[tuple[Place, Row | Scored]], stop: threading.Event
    ) -> Iterator[Row]:
        asked = time.perf_counter()
        while not stop.is_set():
            found = next(rows, None)
            if found is None:
                break
            place, row = found
            if isinstance(row, Scored):
                if row.row.number not in self.spool:
                    writing = self.writing_s
                    self._record(place, row)
                    asked += self.writing_s - writing
            elif row.number not in self.spool:
                self.pending[row.number] = place
                self.reading_s += time.perf_counter() - asked
                yield row
                asked = time.perf_counter()
        self.reading_s += time.perf_counter() - asked

    def _record(self, place: Place, scored: Scored) -> None:
        began = time.perf_counter()
        row, ok = scored.row, not isinstance(scored.result, BadRow)
        error = str(scored.result) if isinstance(scored.result, BadRow) else ""
        data = b""
        if not isinstance(scored.result, BadRow):
            try:
                data = _json({"id": row.id} | dict(scored.result))
            except (TypeError, ValueError) as caught:
                ok, error = False, f"its result cannot be written as JSON: {caught}"
        if not ok:
            place_of = {"file": place.file.name, "line": place.line, "number": row.number}
            data = _json({"id": row.id, **place_of, "error": error})
        entry = Entry(row.number, scored.num_tokens, ok, data)
        self.spool.add(entry)
        self.log.append(entry.line())
        self.scored += 1
        self.tokens += scored.num_tokens
        self.on_row(ok, scored.num_tokens)
        self.step("row")
        self.writing_s += time.perf_counter() - began


def _json(value: dict[str, Any]) -> bytes:
    return JSON.encode(value).encode()


def _commonest(spool: Spool) -> dict[str, int]:
    counts = Counter(json.loads(line)["error"] for line in spool.ordered(ok=False))
    return dict(counts.most_common(MOST_FAILURES))
