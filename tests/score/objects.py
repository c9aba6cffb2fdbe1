"""An object store in this process that is as slow and unreliable as a real one may be."""

import random
import threading
from typing import Any

import fsspec

from xlinfer.score.object_store import ObjectStore


class HttpError(Exception):
    def __init__(self, code: int):
        super().__init__(f"HTTP {code}")
        self.code = code


class Objects(fsspec.AbstractFileSystem):
    """A listing does not name the newest `lag` objects. With `failures`, so many of 100 calls are
    answered 503, 429 or not at all, half of them after they were carried out."""

    protocol = "gs"
    cachable = False

    def __init__(self, *, lag: int = 0, failures: int = 0, seed: int = 0):
        super().__init__()
        self.held: dict[str, bytes] = {}
        self.lag, self.failures, self.failed = lag, failures, 0
        self._random, self._lock = random.Random(seed), threading.Lock()

    def _ask(self, call: Any) -> Any:
        with self._lock:
            fails = self._random.randrange(100) < self.failures
            carried_out = not fails or self._random.random() < 0.5
            result = call() if carried_out else None
            if fails:
                self.failed += 1
                raise self._random.choice([HttpError(503), HttpError(429), ConnectionResetError()])
            return result

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        def write() -> None:
            if mode == "create" and path in self.held:
                error = OSError(22, "At least one of the pre-conditions did not hold")  # s3fs'
                error.__cause__ = HttpError(412)
                raise error
            self.held[path] = bytes(value)

        self._ask(write)

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def cat_file(self, path: str, start=None, end=None, **_: Any) -> bytes:
        return self._ask(lambda: self._get(path)[start:end])

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self._ask(lambda: self.held.update({path2: self._get(path1)}))

    def rm_file(self, path: str) -> None:
        self._ask(lambda: (self._get(path), self.held.pop(path)))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        size = self._ask(lambda: len(self._get(path)))
        return {"name": path, "size": size, "type": "file"}

    def find(self, path: str, *_: Any, **__: Any) -> list[str]:
        listed = lambda: list(self.held)[: len(self.held) - self.lag]
        return self._ask(lambda: [name for name in listed() if name.startswith(f"{path}/")])

    def _get(self, path: str) -> bytes:
        if path not in self.held:
            raise FileNotFoundError(path)
        return self.held[path]


def store_of(objects: Objects) -> ObjectStore:
    store = ObjectStore(objects, "gs://bucket/job/")
    store.sync_interval_s = 0.0
    return store
