"""Finds ids that are there twice, of any number of rows in little memory.

Digests of 128 bits go to one of 256 files by their first byte, and each file is then sorted by
itself. Two ids of one digest are taken for equal: among 10^9 rows the odds that two others share
one are below 10^-20.
"""

import hashlib
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xlinfer.score.inputs import InputError, InputFile

PLACE = struct.Struct("<IQ")  # file, line
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("file", "<u4"), ("line", "<u8")])
HELD_BYTES = 2**13  # of each file, before it is written
MOST_SHOWN = 3


class IdCheck:
    def __enter__(self) -> "IdCheck":
        self._folder = tempfile.TemporaryDirectory(prefix="xlinfer-score-")
        self._held = [bytearray() for _ in range(256)]
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, name: str, file: int, line: int) -> None:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        held = self._held[digest[0]]
        held += digest + PLACE.pack(file, line)
        if len(held) > HELD_BYTES:
            self._write(digest[0])

    def _write(self, first: int) -> Path:
        path = Path(self._folder.name, f"{first}")
        with path.open("ab") as file:
            file.write(self._held[first])
        self._held[first].clear()
        return path

    def check(self, files: Sequence[InputFile]) -> None:
        """Raises InputError naming the places of ids that are there twice."""
        found, count = list[str](), 0
        for first in range(256):
            records = np.fromfile(self._write(first), RECORD)
            # Stable: of equal ids, the order in which they were added.
            records = records[np.lexsort((records["low"], records["high"]))]
            same = np.flatnonzero(
                (records["high"][1:] == records["high"][:-1])
                & (records["low"][1:] == records["low"][:-1])
            )
            count += same.size
            for at in same[: max(0, MOST_SHOWN - len(found))]:
                places = (
                    f"{files[record['file']].name}:{record['line']}"
                    for record in records[at : at + 2]
                )
                found.append(" and ".join(places))
        if count:
            more = f", and {count - len(found)} more" if count > len(found) else ""
            raise InputError(
                f"rows have the same id: {'; '.join(found)}{more}. Make ids unique, or leave out "
                "--id_column: rows are then called by file and line"
            )
