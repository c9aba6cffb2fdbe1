"""From files to rows, a block at a time.

Of a compressed file no reader can begin in the middle, so one that is cut into shards is read from
its beginning for each. A `Reader` therefore stays where it stopped, and a worker that takes shards
in their order reads such a file once.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from xlinfer.score.inputs import InputError, InputFile, blocks, check_unchanged, open_input
from xlinfer.score.manifest import Job, Piece, Shard
from xlinfer.score.rows import BadRow, Row, Scored

MAX_LINE_BYTES = 64 * 2**20  # a longer line is an error row: memory is bounded
BATCH_ROWS = 256  # of a Parquet file, decoded at once
BOM = b"\xef\xbb\xbf"
TEXT = "text"  # the column of a text file


class Line(NamedTuple):
    size: int  # bytes, with the end of line
    data: bytes | None  # without it; None: longer than MAX_LINE_BYTES


class Place(NamedTuple):
    """Where a row stands."""

    file: InputFile
    line: int

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


def lines(source: Iterator[bytes]) -> Iterator[Line]:
    """Each, the last one with or without its end."""
    rest, dropped = b"", 0
    for block in source:
        first, *others = block.split(b"\n")
        if dropped or len(rest) + len(first) > MAX_LINE_BYTES:
            rest, dropped = b"", dropped + len(rest) + len(first)
        else:
            rest += first
        if others:
            yield Line(dropped + len(rest) + 1, None if dropped else rest)
            for line in others[:-1]:
                yield Line(len(line) + 1, line if len(line) <= MAX_LINE_BYTES else None)
            rest, dropped = others[-1], 0
    if size := dropped + len(rest):
        yield Line(size, rest if size <= MAX_LINE_BYTES else None)


def is_row(file: InputFile, line: Line) -> bool:
    """Blank lines of JSON are none; each line of a text is one."""
    return file.format == "text" or line.data is None or bool(line.data.strip())


def parse(file: InputFile, line: int, data: bytes | None) -> Mapping[str, Any]:
    """The columns of a line. Raises BadRow."""
    if data is None:
        raise BadRow(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
    if line == 1:
        data = data.removeprefix(BOM)
    try:
        text = data.removesuffix(b"\r").decode()
        if file.format == "text":
            return {TEXT: text}
        row = json.loads(text)
        if b"\\u" in data:  # halves of a pair have no UTF-8
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise BadRow(f"not UTF-8: {error.reason} at byte {error.start}") from None  # type: ignore[attr-defined]
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow(f"a JSON {type(row).__name__}, not an object with the row's columns")
    return row


def id_of(row: Mapping[str, Any], id_column: str | None, place: Place) -> str:
    """Raises BadRow."""
    if id_column is None:
        return str(place)
    match row.get(id_column):
        case bool() | None:
            pass
        case str(value) | int(value):
            return str(value)
    raise BadRow(f"no id: its column {id_column!r} is {_shown(row, id_column)}")


class Reader:
    """Rows of a job's shards, for one worker."""

    def __init__(self, job: Job):
        self._job = job
        self._checked = set[int]()
        self._at: tuple[int, int, Iterator[Line]] | None = None  # file, next line, from there on

    def rows(self, shard: Shard) -> Iterator[tuple[Place, Row | Scored]]:
        """In order; a row that cannot be read has been scored, as bad. Raises InputError for a
        file that cannot be read, or is not what was planned."""
        number = 0
        for piece in shard.pieces:
            file = self._job.inputs[piece.file]
            if piece.file not in self._checked:
                check_unchanged(file)
                self._checked.add(piece.file)
            for place, columns in self._columns(file, piece):
                yield place, self._row(number, place, columns)
                number += 1
        if number != shard.rows:
            raise InputError(f"shard {shard.index}: {number} rows, planned {shard.rows}")

    def _columns(
        self, file: InputFile, piece: Piece
    ) -> Iterator[tuple[Place, Mapping[str, Any] | BadRow]]:
        if file.format == "parquet":
            job = self._job
            wanted = {*job.columns.values(), *job.optional.values(), job.id_column} - {None}
            for n, columns in enumerate(parquet_rows(file, piece, wanted)):
                yield Place(file, piece.line + n), columns
            return
        left, at = piece.rows, piece.line
        for line in self._lines_from(file, piece):
            if is_row(file, line):
                place = Place(file, at)
                try:
                    yield place, parse(file, at, line.data)
                except BadRow as error:
                    yield place, error
                left -= 1
            at += 1
            if not left:
                break
        if file.compression != "none" and self._at is not None:
            self._at = (piece.file, at, self._at[2])

    def _lines_from(self, file: InputFile, piece: Piece) -> Iterator[Line]:
        if file.compression == "none":
            return lines(blocks(file, piece.offset))
        if self._at is None or self._at[0] != piece.file or self._at[1] > piece.line:
            self._at = (piece.file, 1, lines(blocks(file)))
        _, at, source = self._at
        for _ in range(at, piece.line):
            next(source, None)
        self._at = (piece.file, 2**62, source)  # nowhere known, until these rows are read
        return source

    def _row(self, number: int, place: Place, columns: Mapping[str, Any] | BadRow) -> Row | Scored:
        name, values = str(place), {}
        try:
            if isinstance(columns, BadRow):
                raise columns
            name = id_of(columns, self._job.id_column, place)
            for wanted, column in self._job.columns.items():
                if columns.get(column) is None:
                    raise BadRow(f"no {wanted}: its column {column!r} is {_shown(columns, column)}")
                values[wanted] = columns[column]
            for wanted, column in self._job.optional.items():
                if columns.get(column) is not None:
                    values[wanted] = columns[column]
        except BadRow as error:
            return Scored(Row(number=number, id=name, values={}), error, 0)
        return Row(number=number, id=name, values=values)


@contextmanager
def open_parquet(file: InputFile) -> Iterator[Any]:
    """pyarrow's ParquetFile. Raises InputError."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise InputError(f"{file.url}: pyarrow is needed: pip install 'xlinfer[score]'") from None
    with open_input(file) as source:
        try:
            opened = ParquetFile(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file.url} is truncated or no Parquet file: {error}") from None
        yield opened


def parquet_rows(
    file: InputFile, piece: Piece, columns: Collection[str | None]
) -> Iterator[Mapping[str, Any]]:
    """Of `columns`, those that there are, in the rows of `piece`. Raises InputError."""
    with open_parquet(file) as opened:
        import pyarrow

        groups, skip, left, seen = [], piece.line - 1, piece.rows, 0
        for group in range(opened.metadata.num_row_groups):
            rows = opened.metadata.row_group(group).num_rows
            if seen + rows >= piece.line and seen < piece.line - 1 + piece.rows:
                groups.append(group)
            elif not groups:
                skip -= rows
            seen += rows
        try:
            there = [name for name in opened.schema_arrow.names if name in columns]
            for batch in opened.iter_batches(BATCH_ROWS, row_groups=groups, columns=there):
                taken = batch.slice(skip, left)
                skip, left = max(0, skip - batch.num_rows), left - taken.num_rows
                yield from taken.to_pylist()
                if not left:
                    return
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file.url}: {error}") from None


def _shown(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        return f"missing; there are {', '.join(map(repr, row)) or 'none'}"
    value = row[column]
    return "null" if value is None else f"a {type(value).__name__}"
