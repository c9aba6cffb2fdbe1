"""The plan of a job: which rows each shard has. Made once, and never changed.

A shard is a run of rows, through the end of one file into the next where files are small.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from xlinfer.score.inputs import InputFile

FORMAT = 1


class JobError(ValueError):
    """The job cannot be run as it is asked for; the message says what would be right."""


class Piece(NamedTuple):
    """Rows of one file that follow each other."""

    file: int  # of the job's inputs
    offset: int  # byte where the first begins, in a file of lines that is not compressed; else 0
    line: int  # number of the first, from 1: its line, or the row of a Parquet file
    rows: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    index: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides a job's results and where they are. Two that differ need two outputs."""

    inputs: tuple[InputFile, ...]
    columns: Mapping[str, str]  # what the task calls it -> the column that it is
    optional: Mapping[str, str]  # the same, of columns that a row may lack
    id_column: str | None  # None: rows are called by file and number
    rows_per_shard: int  # at most
    output_format: str  # jsonl, parquet
    compression: str  # of JSON lines: none, gz, zst
    task: Mapping[str, Any]  # its options
    model: Mapping[str, Any]  # what tells it from others


@dataclass(frozen=True, kw_only=True)
class Manifest:
    job: Job
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> bytes:
        made = {
            "format": FORMAT,
            "job": asdict(self.job),
            "shards": [shard.pieces for shard in self.shards],
        }
        return json.dumps(made, ensure_ascii=False).encode()

    @staticmethod
    def from_json(data: bytes) -> "Manifest":
        """Raises JobError for what is no manifest, or one of another version."""
        try:
            made = json.loads(data)
            version = made["format"]
        except (ValueError, TypeError, KeyError):
            raise JobError("manifest.json is not what xlinfer writes") from None
        if version != FORMAT:
            raise JobError(f"manifest.json is of format {version}, and this xlinfer's is {FORMAT}")
        job = made["job"] | {"inputs": tuple(InputFile(**file) for file in made["job"]["inputs"])}
        return Manifest(
            job=Job(**job),
            shards=tuple(
                Shard(index=index, pieces=tuple(Piece(*piece) for piece in pieces))
                for index, pieces in enumerate(made["shards"])
            ),
        )


def differences(there: Job, asked: Job) -> list[str]:
    """What is not the same, a sentence each."""
    old, new = (dict(_leaves(json.loads(json.dumps(asdict(job))))) for job in (there, asked))
    return [
        f"{name} is {_shown(old, name)} there, {_shown(new, name)} here"
        for name in [*old, *(name for name in new if name not in old)]
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]


_ABSENT = object()


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    return json.dumps(leaves[name], ensure_ascii=False) if name in leaves else "not given"


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        if "url" in value:  # a file is called by its name, not by its place among the others
            name = f"{name.partition('[')[0]} {value['name']}"
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]")
    else:
        yield name, value
