"""What `python -m xlinfer.convert --dry_run` prints: every array that would be written, and what it
is made of, proven on headers before a byte of a weight is read."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from converters import Checkpoint, Rule, parameter_rules
from converters.report import ignored, ranges, roles_of
from converters.rules import Axes
from xlinfer.converted import is_converted
from xlinfer.export import plan_export
from xlinfer.weights import check_table

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def plan_orbax(checkpoint: Checkpoint, dtype: np.dtype) -> Iterator[str]:
    """A line for each parameter, then what is not read. Raises CheckpointError unless every tensor
    has one place or is known to carry no weight, and ValueError unless the parameters are those of
    the module, each once."""
    check_table(checkpoint.config)
    roles = roles_of(checkpoint)
    total = 0
    for rule in parameter_rules(checkpoint.config):
        nbytes = math.prod(rule.shape) * dtype.itemsize
        total += nbytes
        yield (
            f"{_target(rule)} {list(rule.shape)} {dtype.name}, {nbytes:,} bytes "
            f"<- {_way(rule)}: {', '.join(braced(rule.sources))}"
        )
    yield from _not_read(checkpoint, roles)
    yield f"{total:,} bytes to write"


def plan_hf(checkpoint: Checkpoint, directory: Path, dtype: np.dtype | None) -> Iterator[str]:
    """A line for each tensor, then what is not read. Raises CheckpointError."""
    placed = plan_export(checkpoint, directory, dtype, compare_copies=False)
    made: dict[str, list[str]] = {name: [] for name in placed}
    if is_converted(checkpoint.path):
        check_table(checkpoint.config)
        for rule in parameter_rules(checkpoint.config):
            for source, start in zip(rule.sources, rule.starts, strict=True):
                at = ", ".join(f"{a}:{a + n}" for a, n in zip(start, rule.layout.slot, strict=True))
                made[source].append(f"{_target(rule)}[{at}] by {_way(rule)}, backwards")
    for name, info in placed.items():
        yield (
            f"{info.file.name}: {name} {list(info.shape)} {info.dtype.name}, {info.nbytes:,} bytes "
            f"<- {' and '.join(made[name]) or 'as it is'}"
        )
    if not is_converted(checkpoint.path):
        yield from _not_read(checkpoint, roles_of(checkpoint))
    yield f"{sum(info.nbytes for info in placed.values()):,} bytes to write"


def braced(names: Sequence[str]) -> list[str]:
    """Names that differ in numbers alone as one: "model.layers.{0-31}.mlp.up_proj.weight"."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        groups.setdefault(NUMBER.sub("*", name), []).append([int(n) for n in NUMBER.findall(name)])
    found = []
    for pattern, numbers in groups.items():
        of = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        said = iter(str(c[0]) if len(c) == 1 else f"{{{ranges(c)}}}" for c in of)
        found.append(re.sub(r"\*", lambda _, said=said: next(said), pattern))
    return found


def _target(rule: Rule) -> str:
    return ".".join(map(str, rule.target))


def _way(rule: Rule) -> str:
    way = f"{_axes(rule.layout.source_axes)} -> {_axes(rule.axes)}"
    if (cut := rule.cut) is None:
        return way
    return f"{cut.start}:{cut.stop} of axis {cut.axis} of {list(cut.view)}, {way}"


def _axes(axes: Axes) -> str:
    return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in axes)


def _not_read(
    checkpoint: Checkpoint, roles: Mapping[str, Mapping[str, str | None]]
) -> Iterator[str]:
    for row in ignored(checkpoint, checkpoint.tensors, roles):
        yield f"not read: {row['name']}, {row['count']} of {row['bytes']:,} bytes: {row['why']}"
