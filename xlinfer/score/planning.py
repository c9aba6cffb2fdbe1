"""Cutting inputs into shards.

Each file of lines is read once when a job is planned. That costs a pass over the input, and buys
what cannot be had without it: shards of exactly `rows_per_shard` rows whatever their length, row
numbers that name a line of a file, progress against a known total, and that a file which is
truncated or an id which is there twice is known before any work. Parquet files tell their rows in
their footer.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from xlinfer.progress import Progress
from xlinfer.score.ids import IdCheck
from xlinfer.score.inputs import InputError, InputFile, blocks
from xlinfer.score.manifest import Job, Manifest, Piece, Shard
from xlinfer.score.readers import (
    Place,
    id_of,
    is_row,
    lines,
    open_parquet,
    parquet_rows,
    parse,
)
from xlinfer.score.rows import BadRow

SAMPLE_ROWS = 100  # of a file of JSON: a column that none of them has is a slip
PROGRESS_BYTES = 2**24


def plan(job: Job, progress: Progress) -> Manifest:
    """Raises InputError for files that cannot be read, have no rows or not the columns, and for
    ids that are there twice. `progress("plan", done, total)` counts bytes."""
    total = sum(file.size for file in job.inputs)
    done = 0
    progress("plan", 0, total)
    with contextlib.ExitStack() as stack:
        ids = stack.enter_context(IdCheck()) if job.id_column is not None else None
        pieces = []
        for index, file in enumerate(job.inputs):
            find = _parquet_pieces if file.format == "parquet" else _line_pieces
            for piece, size in find(job, index, ids):
                if piece is not None:
                    pieces.append(piece)
                progress("plan", min(done + size, total), total)
            done += file.size
        if ids is not None:
            ids.check(job.inputs)
    if not pieces:
        raise InputError("the inputs hold no rows")
    progress("plan", total, total)
    shards = _packed(pieces, job.rows_per_shard)
    return Manifest(job=job, shards=tuple(shards))


def _packed(pieces: Iterable[Piece], most: int) -> Iterator[Shard]:
    """Whole pieces, in order, as many as a shard may have."""
    index, taken = 0, list[Piece]()
    for piece in pieces:
        if taken and sum(other.rows for other in taken) + piece.rows > most:
            yield Shard(index=index, pieces=tuple(taken))
            index, taken = index + 1, []
        taken.append(piece)
    yield Shard(index=index, pieces=tuple(taken))


def _line_pieces(job: Job, index: int, ids: IdCheck | None) -> Iterator[tuple[Piece | None, int]]:
    """Each with the bytes of the file that have been read, where that is known; None in between,
    for progress."""
    file = job.inputs[index]
    plain, most = file.compression == "none", job.rows_per_shard
    begin, first, rows = 0, 1, 0  # of the piece
    offset = number = shown = 0
    sample: _Sample | None = _Sample(job, file)
    for number, line in enumerate(lines(blocks(file)), 1):
        if is_row(file, line):
            if rows == most:
                yield Piece(index, begin if plain else 0, first, rows), offset if plain else 0
                begin, first, rows = offset, number, 0
            rows += 1
            if sample is not None or ids is not None:
                place = Place(file, number)
                try:
                    columns = parse(file, number, line.data)
                    if ids is not None:
                        ids.add(id_of(columns, job.id_column, place), index, number)
                except BadRow:  # it is told when its shard is run
                    columns = {}
                if sample is not None and sample.enough(columns):
                    sample = None
        offset += line.size
        if offset - shown > PROGRESS_BYTES:
            shown = offset
            yield None, offset if plain else 0
    if sample is not None:
        sample.check()
    if rows:
        yield Piece(index, begin if plain else 0, first, rows), file.size


class _Sample:
    """What columns the first rows of a file have."""

    def __init__(self, job: Job, file: InputFile):
        self._job, self._file = job, file
        self._seen = dict[str, None]()
        self._left = SAMPLE_ROWS

    def enough(self, columns: Mapping[str, Any]) -> bool:
        """Raises InputError once it is clear that a column is not there."""
        self._seen.update(dict.fromkeys(columns))
        self._left -= 1
        if not self._left:
            self.check()
        return not self._left

    def check(self) -> None:
        if self._seen:  # else no line could be read, which each of them says
            check_columns(self._job, self._file, list(self._seen))


def check_columns(job: Job, file: InputFile, there: list[str]) -> None:
    """Raises InputError."""
    flags = {column: f"--column={name}={column}" for name, column in job.columns.items()}
    if job.id_column is not None:
        flags.setdefault(job.id_column, f"--id_column={job.id_column}")
    for column, flag in flags.items():
        if column not in there and file.format != "text":
            raise InputError(
                f"{file.url} has no column {column!r} ({flag}); it has {', '.join(there)}"
            )


def _parquet_pieces(job: Job, index: int, ids: IdCheck | None) -> Iterator[tuple[Piece, int]]:
    file = job.inputs[index]
    with open_parquet(file) as opened:
        rows = opened.metadata.num_rows
        check_columns(job, file, opened.schema_arrow.names)
    if ids is not None and job.id_column is not None and rows:
        whole = Piece(index, 0, 1, rows)
        for number, columns in enumerate(parquet_rows(file, whole, [job.id_column]), 1):
            with contextlib.suppress(BadRow):
                ids.add(id_of(columns, job.id_column, Place(file, number)), index, number)
    for first in range(0, rows, job.rows_per_shard):
        yield Piece(index, 0, first + 1, min(job.rows_per_shard, rows - first)), file.size
