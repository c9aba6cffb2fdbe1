"""The values in a GGUF header, one after the other, each proven to lie in the file."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError

STRING, ARRAY = 8, 9
# Scalar types of metadata, by number, as struct spells them.
SCALARS: Mapping[int, str] = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f"},
    **{7: "?", 10: "Q", 11: "q", 12: "d"},
}
UINT32, UINT64 = 4, 10
MAX_DIMS = 4


class HeaderReader:
    """The bytes of a header from front to back, `what` naming in errors what was to be read."""

    def __init__(self, path: Path, data: memoryview, size: int):
        self.path, self._data, self._size, self.at = path, data, size, 0

    def take(self, count: int, what: str) -> bytes:
        self._check(count, what)
        self.at += count
        return bytes(self._data[self.at - count : self.at])

    def _check(self, count: int, what: str) -> None:
        if count > self._size - self.at:
            raise CheckpointError(
                f"{self.path} is truncated: {what} takes {count} bytes from byte {self.at} on, and "
                f"the file has {self._size}"
            )

    def scalar(self, kind: int, what: str) -> Any:
        form = "<" + SCALARS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        text = self.take(self.scalar(UINT64, f"the length of {what}"), what)
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8: {error}") from None

    def value(self, kind: int, what: str) -> Any:
        """A number, text or flag; a list of them for an array."""
        if kind == STRING:
            return self.string(what)
        if kind in SCALARS:
            return self.scalar(kind, what)
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: {what} has type {kind}, which GGUF does not know")
        of = self.scalar(UINT32, f"the type in {what}")
        count = self.scalar(UINT64, f"the length of {what}")
        if of == STRING:
            return self._strings(count, what)
        if of not in SCALARS:
            raise CheckpointError(
                f"{self.path}: {what} is an array of type {of}; xlinfer reads arrays of numbers, "
                "flags and strings"
            )
        data = self.take(count * struct.calcsize("<" + SCALARS[of]), what)
        return list(struct.unpack(f"<{count}{SCALARS[of]}", data))

    def entry(self) -> tuple[str, list[int], int, int]:
        """Name, sizes (the last axis first), type and offset of a tensor."""
        name = self.string("a tensor's name")
        where = f"tensor {name!r}"
        dims = self.scalar(UINT32, f"the dimensions of {where}")
        if dims > MAX_DIMS:
            raise CheckpointError(f"{self.path}: {where} has {dims} axes, more than {MAX_DIMS}")
        sizes = [self.scalar(UINT64, f"the shape of {where}") for _ in range(dims)]
        kind = self.scalar(UINT32, f"the type of {where}")
        return name, sizes, kind, self.scalar(UINT64, f"the place of {where}")

    def _strings(self, count: int, what: str) -> list[str]:
        """Vocabularies are long: one loop, without a call for each."""
        self._check(8 * count, what)  # each begins with a length of 8 bytes
        data, at, length, texts = self._data, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            end = at + 8
            end += length(data, at)[0] if end <= self._size else 0
            if end > self._size:
                self.at = at
                self._check(end - at, what)
            texts.append(bytes(data[at + 8 : end]))
            at = end
        self.at = at
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8: {error}") from None
