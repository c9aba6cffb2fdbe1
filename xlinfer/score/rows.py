"""Rows of a batch job, and whatever scores them. No jax."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class BadRow(ValueError):
    """This row cannot be scored; the message goes into the errors file."""


@dataclass(frozen=True, kw_only=True)
class Row:
    number: int  # in its shard, from 0
    id: str  # of the id column, or "<file>:<number in file>"
    values: Mapping[str, Any]  # the columns the task asked for, under the task's names for them


class Scored(NamedTuple):
    row: Row
    result: Mapping[str, Any] | BadRow  # JSON-able
    num_tokens: int  # computed for it


class Scorer(Protocol):
    """Whatever scores rows: an engine with a task. Asks `rows` for the next only as it has room, so
    that memory is bounded; gives results in any order, each row once."""

    def __call__(self, rows: Iterable[Row]) -> Iterator[Scored]: ...
