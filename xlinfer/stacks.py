"""Which layers are stacked and scanned together: those that repeat by a pattern."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Layers `first` on: `period` of them after another, `repeats` times."""

    first: int
    period: int
    repeats: int

    @property
    def end(self) -> int:
        return self.first + self.period * self.repeats

    @property
    def stacks(self) -> tuple[range, ...]:
        """The layers of each stack: those at the same place of the period."""
        return tuple(range(self.first + j, self.end, self.period) for j in range(self.period))


def runs(kinds: Sequence[Hashable]) -> tuple[Run, ...]:
    """All layers in order, cut so that those of a stack have one kind.

    Each stack is a program of one layer, so there are as few as can be; of equals as few runs,
    and then the longest first.
    """
    numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    kinds, last = [numbers[kind] for kind in kinds], len(kinds)
    # For the layers from each one on: stacks, runs, and what decides between equals.
    best: list[tuple[int, int, int, tuple[Run, ...]]] = [(0, 0, 0, ())] * (last + 1)
    for first in reversed(range(last)):
        found = []
        for period in range(1, last - first + 1):
            pattern = kinds[first : first + period]
            repeats, start = 0, first
            while start + period <= last and kinds[start : start + period] == pattern:
                repeats, start = repeats + 1, start + period
                stacks, count, _, after = best[start]
                run = Run(first, period, repeats)
                found.append((stacks + period, count + 1, -start, (run, *after)))
        best[first] = min(found)
    return best[0][-1]


def stacks(kinds: Sequence[Hashable]) -> tuple[range, ...]:
    """The layers of every stack, run after run."""
    return tuple(layers for run in runs(kinds) for layers in run.stacks)
