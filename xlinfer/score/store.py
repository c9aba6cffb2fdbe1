"""Where a job keeps what it knows and makes: a folder, or a prefix of an object store.

What must not be made twice is made by `create`, which is atomic: the first to make a name wins, and
nobody sees half of it. Names are relative, with "/" between their parts.
"""

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

# Protocols of fsspec whose writes can be conditional: GCS takes ifGenerationMatch=0 and S3
# If-None-Match: *, both behind pipe_file(mode="create").
CONDITIONAL = {"gs", "gcs", "s3", "s3a"}


class StoreError(Exception):
    """The store cannot do what is asked; the message says what would help."""


class Log(Protocol):
    """Where one worker writes down what it has done. Made by nobody else."""

    def append(self, data: bytes) -> None:
        """When it returns, `data` survives a crash of the machine."""
        ...

    def close(self) -> None: ...


class Store(ABC):
    url: str
    sync_interval_s: float  # how long finished rows may wait, since each append costs

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def lines(self, name: str) -> Iterator[bytes]:
        """With their ends, which the last may lack. Raises FileNotFoundError."""
        yield from self.read(name).splitlines(keepends=True)

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def list(self, folder: str) -> list[str]:
        """Names of all files below `folder`, sorted. An object store's may lack the newest."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Make `name`, whole and durable; False if it was there. Of several at once, one wins."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Make or replace `name`, whole."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> None:
        """What is not there is no error."""

    @abstractmethod
    def log(self, name: str) -> Log:
        """A new one; all its parts are below `name`."""

    @abstractmethod
    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        """A local file to fill, which is `name` in the store, and durable, when the block ends."""
        yield Path()

    @abstractmethod
    def publish(self, draft: str, name: str) -> None:
        """Show `draft` as `name` too. Whoever does so again does no harm: callers have agreed on
        the one draft that `name` stands for."""


def open_store(url: str) -> Store:
    """Raises StoreError for a store where nothing can be created atomically."""
    protocol, separator, _ = url.partition("://")
    if not separator or protocol == "file":
        return LocalStore(url.removeprefix("file://"))
    if protocol not in CONDITIONAL:
        raise StoreError(
            f"{url}: in {protocol}:// no file can be created on condition that it is not there, "
            "by which results are kept from being written twice; write to a folder, gs:// or s3://"
        )
    from xlinfer.score.object_store import ObjectStore, filesystem

    return ObjectStore(filesystem(url), url)


class LocalStore(Store):
    """A folder, of this machine or shared by several (NFS, Lustre), made when something is
    written. Files are made aside and linked: link(2) is atomic, over NFS too."""

    sync_interval_s = 1.0

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(folder).expanduser().absolute()
        self.url = os.fspath(self._folder)

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def lines(self, name: str) -> Iterator[bytes]:
        with (self._folder / name).open("rb") as file:
            yield from file

    def exists(self, name: str) -> bool:
        return (self._folder / name).exists()

    def list(self, folder: str) -> list[str]:
        found = (
            os.path.join(root, name)
            for root, _, names in os.walk(self._folder / folder)
            for name in names
            if not name.startswith(".")
        )
        return sorted(os.path.relpath(path, self._folder).replace(os.sep, "/") for path in found)

    def create(self, name: str, data: bytes) -> bool:
        path = self._folder / name
        return not path.exists() and self._through(path, data, _link)

    def put(self, name: str, data: bytes) -> None:
        self._through(self._folder / name, data, _replace)

    def _through(self, path: Path, data: bytes, place: Callable[[Path, Path], bool]) -> bool:
        make_folder(path.parent)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with aside.open("xb") as file:
                file.write(data)
                os.fsync(file.fileno())
            placed = place(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(path.parent)
        return placed

    def remove(self, names: Sequence[str]) -> None:
        """And the folders that are then empty, but for the first of a name: another worker may
        be about to make one in it."""
        for name in names:
            path = self._folder / name
            path.unlink(missing_ok=True)
            for folder in list(path.parents)[: max(0, len(Path(name).parts) - 2)]:
                try:
                    folder.rmdir()
                except OSError:  # not empty, or gone
                    break

    def log(self, name: str) -> Log:
        return _LocalLog(self._folder / name)

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        path = self._folder / name
        make_folder(path.parent)
        yield path
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_folder(path.parent)

    def publish(self, draft: str, name: str) -> None:
        path = self._folder / name
        make_folder(path.parent)
        try:
            _link(self._folder / draft, path)
        except FileNotFoundError:
            if not path.exists():  # else somebody has published it, and cleared up
                raise
        sync_folder(path.parent)


class _LocalLog:
    def __init__(self, path: Path):
        make_folder(path.parent)
        self._file = path.open("xb", buffering=0)
        sync_folder(path.parent)

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(
            f"{target.parent}: {error.strerror}. A file cannot be made there whole and at once, "
            "which takes hard links; name another --output, an object store by its own URL"
        ) from None
    return True


def _replace(source: Path, target: Path) -> bool:
    os.replace(source, target)
    return True


def make_folder(folder: Path) -> None:
    """With its parents, and durable."""
    missing = [folder, *folder.parents]
    missing = missing[: next(n for n, path in enumerate(missing) if path.is_dir())]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # cleared up by who has won
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
