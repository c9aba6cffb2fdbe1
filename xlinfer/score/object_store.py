"""A prefix of an object store, through fsspec."""

import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xlinfer.score.store import Log, Store, StoreError

logger = logging.getLogger("xlinfer.score")
# 409: S3, where two conditional writes of one name meet.
PASSING = {408, 409, 429, 500, 502, 503, 504}
TRIES = 8  # with twice the pause each time, half a minute
PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0


def filesystem(url: str) -> Any:
    """fsspec's, without caches of listings. Raises StoreError naming the package that lacks."""
    try:
        import fsspec
    except ModuleNotFoundError:
        raise StoreError(f"{url}: fsspec is needed: pip install 'xlinfer[score]'") from None
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)[0]
    except (ImportError, ValueError) as error:
        raise StoreError(f"{url}: {error}") from None


class ObjectStore(Store):
    """`files` is an fsspec file system whose pipe_file(mode="create") is a conditional write.

    Nothing here depends on a listing for being right: it may lag behind.
    """

    sync_interval_s = 10.0  # each sync is an object

    def __init__(self, files: Any, url: str):
        self._files, self.url = files, url.rstrip("/")
        self._root = files._strip_protocol(self.url)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes:
        return retried(lambda: self._files.cat_file(self._path(name)))

    def exists(self, name: str) -> bool:
        try:  # fsspec's own `exists` takes any error for a no
            retried(lambda: self._files.info(self._path(name)))
        except FileNotFoundError:
            return False
        return True

    def list(self, folder: str) -> list[str]:
        def found() -> list[str]:
            self._files.invalidate_cache()
            return self._files.find(self._path(folder))

        return sorted(path.removeprefix(f"{self._root}/") for path in retried(found))

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        asked = 0

        def write() -> bool:
            nonlocal asked
            asked += 1
            try:
                self._files.pipe_file(path, data, mode="create")
            except OSError as error:
                if isinstance(error, FileExistsError) or status(error) == 412:
                    return False
                raise
            return True

        if retried(write):
            return True
        # An answer may have been lost after the write: then what is there is ours.
        return asked > 1 and self.read(name) == data

    def put(self, name: str, data: bytes) -> None:
        retried(lambda: self._files.pipe_file(self._path(name), data))

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                retried(lambda name=name: self._files.rm_file(self._path(name)))
            except FileNotFoundError:
                pass

    def log(self, name: str) -> Log:
        return _Parts(self, name)

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        handle, local = tempfile.mkstemp(prefix="xlinfer-score-")
        os.close(handle)
        try:
            yield Path(local)
            retried(lambda: self._files.put_file(local, self._path(name)))
        finally:
            os.unlink(local)

    def publish(self, draft: str, name: str) -> None:
        if self.exists(name):
            return
        try:
            retried(lambda: self._files.cp_file(self._path(draft), self._path(name)))
        except FileNotFoundError:
            if not self.exists(name):  # else somebody has published it, and cleared up
                raise


class _Parts:
    """Objects cannot grow: a log is numbered objects."""

    def __init__(self, store: ObjectStore, name: str):
        self._store, self._name, self._count = store, name, 0

    def append(self, data: bytes) -> None:
        self._store.put(f"{self._name}/{self._count:06}", data)
        self._count += 1

    def close(self) -> None:
        pass


def retried[T](call: Callable[[], T]) -> T:
    """`call`'s result; again after a pause, while the store or the way to it is out of order."""
    for left in reversed(range(TRIES)):
        try:
            return call()
        except Exception as error:
            if not left or not passes(error):
                raise
            # Many workers, of which each should try at another time.
            most = min(LONGEST_PAUSE_S, PAUSE_S * 2 ** (TRIES - 1 - left))
            pause = random.uniform(most / 2, most)
            logger.warning("The store: %s. Again in %.1f s.", error, pause)
        time.sleep(pause)
    raise AssertionError


def passes(error: BaseException) -> bool:
    """Whether to wait may help."""
    if isinstance(error, ConnectionError | TimeoutError) or status(error) in PASSING:
        return True
    return type(error).__module__.partition(".")[0] == "aiohttp" and status(error) is None


def status(error: BaseException | None) -> int | None:
    """Of HTTP, as gcsfs (`code`), aiohttp (`status`) and botocore (`response`) keep it; s3fs
    raises an OSError from botocore's."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for name in ("code", "status"):
            value = getattr(error, name, None)
            if isinstance(value, int | str) and str(value).isdigit():
                return int(value)
        error = error.__cause__
    return None
