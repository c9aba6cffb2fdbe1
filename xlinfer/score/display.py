"""How far a job is, for people: a bar on a terminal, else a line now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

BAR_S, LINE_S = 0.2, 10.0  # between two looks


class Meter:
    """Counts rows and tokens, from any thread, and has them shown."""

    def __init__(self, show: Callable[["Meter"], None], interval_s: float, total: int, done: int):
        self.total, self.done, self.failed, self.tokens = total, done, 0, 0
        self._show, self._interval = show, interval_s
        self._before, self._began = done, time.monotonic()
        self._next, self._lock = self._began + interval_s, threading.Lock()

    def add(self, rows: int, failed: int, tokens: int) -> None:
        with self._lock:
            self.done, self.failed = self.done + rows, self.failed + failed
            self.tokens += tokens
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + self._interval
            self._show(self)

    def row(self, ok: bool, tokens: int) -> None:
        self.add(1, not ok, tokens)

    def end(self) -> None:
        with self._lock:
            self._show(self)

    def __str__(self) -> str:
        """ "1,234/5,000 rows, 17 failed, 8,100 tokens/s, 41 s left" """
        seconds = max(time.monotonic() - self._began, 1e-9)
        parts = [f"{self.done:,}/{self.total:,} rows"]
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        parts.append(f"{self.tokens / seconds:,.0f} tokens/s")
        if rate := (self.done - self._before) / seconds:
            parts.append(f"{_time((self.total - self.done) / rate)} left")
        return ", ".join(parts)


@contextmanager
def show_rows(total: int, done: int, stream: TextIO | None = None) -> Iterator[Meter]:
    """`done` of `total` rows were there before. Owns the terminal's last line in the block."""
    stream = sys.stderr if stream is None else stream
    if stream is None:  # a process without standard error
        yield Meter(lambda meter: None, LINE_S, total, done)
        return
    if not stream.isatty():
        meter = Meter(
            lambda meter: print(f"Scoring: {meter}", file=stream, flush=True), LINE_S, total, done
        )
        yield meter
        meter.end()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("Scoring"), BarColumn(), TextColumn("{task.fields[said]}")
    with Progress(*columns, console=Console(file=stream)) as bars:
        task = bars.add_task("", total=total, completed=done, said="")
        show = lambda meter: bars.update(task, completed=meter.done, said=str(meter))
        meter = Meter(show, BAR_S, total, done)
        yield meter
        meter.end()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
