"""The files that a job reads: found, described and opened. Local ones need no fsspec."""

import glob
import gzip
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from xlinfer.score.object_store import filesystem, passes, retried
from xlinfer.score.store import StoreError

Format = Literal["jsonl", "parquet", "text"]
Compression = Literal["none", "gz", "zst"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
    ".pq": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
BLOCK_BYTES = 2**20
# What object stores call that which changes with the content, best first.
ETAGS = (
    *("etag", "ETag", "generation", "md5Hash", "crc32c", "mtime", "LastModified", "last_modified"),
    *("updated", "created"),
)


class InputError(ValueError):
    """An input cannot be read; the message names it and says why."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    name: str  # below the folder that all inputs share: what rows without an id are called by
    url: str
    size: int  # bytes
    etag: str  # changes when the content does: of a local file, the time of its last change
    format: Format
    compression: Compression


def find_inputs(patterns: Sequence[str], given: Format | None) -> tuple[InputFile, ...]:
    """In the order of `patterns`, and by name where one stands for several. `given`: their format;
    None: as their names end. Raises InputError."""
    urls = [url for pattern in patterns for url in _matches(pattern)]
    seen = set[str]()
    for url in urls:
        if url in seen:
            raise InputError(f"{url} is named twice among the inputs; each row would be doubled")
        seen.add(url)
        try:
            url.encode()
        except UnicodeError:
            raise InputError(f"{url!r}: a file's name must be UTF-8; rename it") from None
    names = _short_names(urls)
    files = []
    for name, url in zip(names, urls, strict=True):
        form, compression = _form(url, given)
        size, etag = describe(url)
        files.append(
            InputFile(
                name=name, url=url, size=size, etag=etag, format=form, compression=compression
            )
        )
    return tuple(files)


def describe(url: str) -> tuple[int, str]:
    """(bytes, etag). Raises InputError."""
    try:
        if not _is_remote(url):
            found = os.stat(url)
            return found.st_size, str(found.st_mtime_ns)
        info = retried(lambda: filesystem(url).info(url))
    except (OSError, StoreError) as error:
        raise InputError(f"{url}: {_reason(error)}") from None
    return int(info["size"] or 0), str(next((info[key] for key in ETAGS if info.get(key)), ""))


def check_unchanged(file: InputFile) -> None:
    """Raises InputError."""
    if describe(file.url) != (file.size, file.etag):
        raise InputError(
            f"{file.url} has changed since the job was planned; put it back, or start a job of its "
            "own in another --output"
        )


def open_input(file: InputFile, offset: int = 0) -> BinaryIO:
    """As it is stored, at a byte. Raises InputError."""
    try:
        if not _is_remote(file.url):
            opened: Any = open(file.url, "rb")
        else:
            files = filesystem(file.url)
            opened = retried(lambda: files.open(file.url, "rb"))
        opened.seek(offset)
    except (OSError, StoreError) as error:
        raise InputError(f"{file.url}: {_reason(error)}") from None
    return opened


def blocks(file: InputFile, offset: int = 0) -> Iterator[bytes]:
    """What `file` holds, decompressed, from a byte on, which only one that is not compressed may
    name. Raises InputError, for one that ends too early too."""
    with open_input(file, offset) as opened:
        try:
            if file.compression == "zst":
                yield from _zstd_blocks(opened)
            else:
                source = gzip.GzipFile(fileobj=opened) if file.compression == "gz" else opened
                while block := retried(lambda: source.read(BLOCK_BYTES)):
                    yield block
        except EOFError:
            raise InputError(f"{file.url} is truncated: its compressed data have no end") from None
        except Exception as error:
            if not isinstance(error, OSError | ValueError) and not passes(error):
                raise
            raise InputError(f"{file.url}: {_reason(error)}") from None


def _zstd_blocks(opened: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: zstandard's own reader takes a truncated file for a whole one. Raises
    EOFError, ValueError for what is no such data."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ValueError("zstandard is needed: pip install 'xlinfer[score]'") from None

    try:
        # Little at a time: it may decompress to much.
        frame, started = zstandard.ZstdDecompressor().decompressobj(), False
        while block := opened.read(BLOCK_BYTES // 64):
            while block:
                started = True
                if out := frame.decompress(block):
                    yield out
                block = b""
                if frame.eof:
                    block = frame.unused_data
                    frame, started = zstandard.ZstdDecompressor().decompressobj(), False
        if started:
            raise EOFError
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _is_remote(url: str) -> bool:
    return "://" in url


def _matches(pattern: str) -> list[str]:
    remote = _is_remote(pattern) and not pattern.startswith("file://")
    try:
        if not remote:
            path = os.path.abspath(os.path.expanduser(pattern.removeprefix("file://")))
            found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            folders = [path for path in found if os.path.isdir(path)]
        else:
            files = filesystem(pattern)
            found = [files.unstrip_protocol(path) for path in retried(lambda: files.glob(pattern))]
            folders = [url for url in found if files.isdir(url)]
    except (OSError, StoreError) as error:
        raise InputError(f"--input={pattern}: {_reason(error)}") from None
    if not found:
        raise InputError(f"--input={pattern}: there is no such file, and none that it matches")
    if folders:
        raise InputError(
            f"--input={pattern}: {folders[0]} is a folder; name files, as in {folders[0]}/*.jsonl"
        )
    return sorted(found)


def _form(url: str, given: Format | None) -> tuple[Format, Compression]:
    stem, suffix = posixpath.splitext(url)
    compression = COMPRESSIONS.get(suffix.lower(), "none")
    if compression == "none":
        stem = url
    form = given or SUFFIXES.get(posixpath.splitext(stem)[1].lower())
    if form is None:
        raise InputError(
            f"{url}: its name does not say what it holds; give --input_format (jsonl, parquet or "
            f"text), or end it in one of {', '.join(SUFFIXES)}, and .gz or .zst if compressed"
        )
    if form == "parquet" and compression != "none":
        raise InputError(f"{url}: Parquet compresses within; decompress the file first")
    return form, compression


def _short_names(urls: Sequence[str]) -> list[str]:
    parts = [url.split("/")[:-1] for url in urls]
    level = 0
    while all(len(part) > level and part[level] == parts[0][level] for part in parts):
        level += 1
    return ["/".join(url.split("/")[level:]) for url in urls]


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
