"""Files of a shard's rows, from their JSON."""

import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from xlinfer.score.inputs import Compression
from xlinfer.score.manifest import Job, JobError

OutputFormat = Literal["jsonl", "parquet"]
BATCH_ROWS = 512  # of Parquet, in memory at once
ROW_GROUP_ROWS = 2**14


def suffix_of(job: Job) -> str:
    """Of the names of parts."""
    if job.output_format == "parquet":
        return ".parquet"
    return ".jsonl" if job.compression == "none" else f".jsonl.{job.compression}"


def check_packages(output_format: OutputFormat, compression: Compression) -> None:
    """Raises JobError naming what is not installed."""
    if output_format == "parquet" and compression != "none":
        raise JobError("--compression is for JSON lines; Parquet compresses within")
    for wanted, package in (
        (output_format == "parquet", "pyarrow"),
        (compression == "zst", "zstandard"),
    ):
        if wanted:
            try:
                __import__(package)
            except ModuleNotFoundError:
                raise JobError(f"{package} is needed: pip install 'xlinfer[score]'") from None


def write_part(path: Path, job: Job, rows: Callable[[], Iterable[bytes]]) -> None:
    """`rows()`: the JSON of each row, in order; asked for twice where a schema must be found."""
    if job.output_format == "parquet":
        _write_parquet(path, rows)
        return
    with path.open("wb") as file, _compressor(file, job.compression) as target:
        write_lines(target, rows())


def write_lines(target: BinaryIO, rows: Iterable[bytes]) -> None:
    for row in rows:
        target.write(row + b"\n")


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compressor(file: BinaryIO, compression: str) -> Any:
    if compression == "gz":
        # Neither name nor time within: the same rows are the same bytes.
        return gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0)
    if compression == "zst":
        import zstandard

        return zstandard.ZstdCompressor().stream_writer(file, closefd=False)
    return open(file.fileno(), "wb", closefd=False)


def _write_parquet(path: Path, rows: Callable[[], Iterable[bytes]]) -> None:
    """With one schema for all rows: a column that a row lacks is null there."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([("id", pyarrow.string())])
    for batch in _batches(rows()):
        found = pyarrow.Table.from_pylist(batch, _schema(batch)).schema
        schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
    with ParquetWriter(path, schema) as writer:
        for batch in _batches(rows()):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema), ROW_GROUP_ROWS)


def _schema(batch: list[dict[str, Any]]) -> Any:
    """With every column that any row has: pyarrow looks at the first row's alone."""
    import pyarrow

    names = dict.fromkeys(itertools.chain.from_iterable(batch))
    return pyarrow.schema(
        [(name, pyarrow.infer_type([row.get(name) for row in batch])) for name in names]
    )


def _batches(rows: Iterable[bytes]) -> Iterator[list[dict[str, Any]]]:
    for batch in itertools.batched(rows, BATCH_ROWS):
        yield [json.loads(row) for row in batch]
