"""What a long start-up shows: `progress(phase, done, total)`, called as work completes.

Phases are "download", "load" and "write" (bytes of weights), "compile" (programs) and "plan" (bytes
of a job's input); the first call of each says 0 of the total, so that its time is counted from the
start. Any callable of that shape will do; `show_progress()` is the one for people.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TextIO

Progress = Callable[[str, int, int], None]

# phase -> (what a reader calls it, what one unit is)
PHASES = {
    "download": ("Downloading", "bytes"),
    "load": ("Loading weights", "bytes"),
    "write": ("Writing weights", "bytes"),
    "compile": ("Compiling", "programs"),
    "plan": ("Reading the input", "bytes"),
}


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """A display on `stream` (standard error): bars on a terminal, else a line every tenth.

    The display owns the terminal's last lines until the block ends.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None:  # a process without standard error
        yield lambda phase, done, total: None
        return
    if not stream.isatty():
        yield plain_progress(stream)
        return
    # Only terminals pay for importing rich.
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.fields[count]}")
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with Bars(*columns, *times, console=Console(file=stream)) as bars:
        tasks = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(_title(phase), total=total, count="")
            bars.update(tasks[phase], completed=done, total=total, count=_count(phase, done, total))

        yield show


def plain_progress(stream: TextIO) -> Progress:
    """One line when a phase starts, at each tenth of it with the time left, and when it ends with
    its seconds."""
    tenths, started = {}, {}

    def show(phase: str, done: int, total: int) -> None:
        tenth = 10 if done >= total else 10 * done // total
        if tenths.get(phase, -1) >= tenth:
            return
        tenths[phase] = tenth
        started.setdefault(phase, monotonic())
        seconds = monotonic() - started[phase]
        if tenth == 10:
            times = f" in {seconds:.1f} s"
        else:
            times = f", {seconds * (total - done) / done:.0f} s left" if done else ""
        print(f"{_title(phase)}: {_count(phase, done, total)}{times}", file=stream, flush=True)

    return show


def _title(phase: str) -> str:
    return PHASES[phase][0] if phase in PHASES else phase.capitalize()


def _count(phase: str, done: int, total: int) -> str:
    if PHASES.get(phase, ("", ""))[1] == "bytes":
        return f"{done / 2**20:,.0f}/{total / 2**20:,.0f} MiB"
    return f"{done:,}/{total:,}"
