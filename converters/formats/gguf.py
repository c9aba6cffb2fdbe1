"""GGUF on disk (versions 2 and 3, little-endian): counts, typed metadata, tensor infos, then the
tensors' bytes, each at a multiple of the alignment.

The header is read here and not by the gguf package: its reader believes every count, length and
offset that the file states (a string of 2^60 bytes becomes a short view, a tensor past the end one
of fewer elements), multiplies sizes in wrapping 64-bit integers, does not see that tensors overlap
or that a block does not divide a row, and makes an array for each element of the vocabulary. Here
everything is proven against the file's size first; a tensor is then a read-only view of the file,
its blocks as they are.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError, listing
from converters.formats.gguf_header import UINT32, UINT64, HeaderReader
from converters.formats.safetensors import TensorInfo
from converters.formats.safetensors import read_tensor as read_bytes

MAGIC = b"GGUF"
OLDER = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"GGML": "GGML"}
VERSIONS = (2, 3)
ALIGNMENT = 32  # where general.alignment is absent


@dataclass(frozen=True)
class BlockType:
    """`elements` of a row, one after the other, share `nbytes` bytes."""

    name: str
    elements: int
    nbytes: int


# The types that are read, by number. Those of one element are dtypes.
FLOATS: Mapping[int, tuple[str, np.dtype]] = {
    0: ("F32", np.dtype(np.float32)),
    1: ("F16", np.dtype(np.float16)),
    28: ("F64", np.dtype(np.float64)),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
BLOCKS: Mapping[int, BlockType] = {
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    39: BlockType("MXFP4", 32, 17),
}
# Known, and not read.
REFUSED: Mapping[int, str] = {
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"},
    **{19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64"},
    **{29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0"},
    **{36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 40: "NVFP4", 41: "Q1_0"},
}
READ = ", ".join([*(name for name, _ in FLOATS.values()), *(b.name for b in BLOCKS.values())])


@dataclass(frozen=True, kw_only=True)
class GGUFTensor(TensorInfo):
    """A tensor [..., N, K] as Hugging Face has it, and how it lies in the file.

    Of floats `dtype` is theirs; of blocks it is uint8, and `shape` still counts elements.
    """

    blocks: BlockType | None  # None: floats
    # The rows of each of so many heads of q or k stand in the file as [pairs, 2], and are meant as
    # [2, pairs]; None: in order.
    paired_heads: int | None = None
    added: float = 0.0  # by the writer to every element

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.dtype.itemsize

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """`shape`, of blocks with the bytes of a row in place of its elements."""
        if self.blocks is None:
            return self.shape
        *outer, K = self.shape
        return (*outer, K // self.blocks.elements * self.blocks.nbytes)

    @property
    def row_order(self) -> np.ndarray | None:
        """The stored row that each row is, [N] int; None: its own."""
        if self.paired_heads is None:
            return None
        rows = np.arange(self.shape[0]).reshape(self.paired_heads, -1, 2)
        return rows.swapaxes(1, 2).reshape(-1)


def read_gguf_tensor(info: GGUFTensor) -> np.ndarray:
    """`info.shape` of `info.dtype`, or of blocks their bytes, [..., N, bytes of a row] uint8; rows
    in Hugging Face's order. A read-only view of the file unless something had to be undone.

    Raises CheckpointError when the file has become shorter or has gone since its header was read.
    """
    stored = TensorInfo(
        name=info.name, file=info.file, dtype=info.dtype, shape=info.stored_shape,
        offset=info.offset,
    )  # fmt: skip
    data = read_bytes(stored)
    if info.row_order is not None:
        data = data[info.row_order]
    return data - np.float32(info.added) if info.added else data


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """One model: the metadata of its first file, and the tensors of all by the names in them."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def find_gguf(path: Path) -> Path | None:
    """The GGUF at `path`: that file, or the only model of a folder without a config.json, of which
    the first part if it is split. None where there is none.

    Raises CheckpointError for a folder that holds several.
    """
    if is_gguf(path):
        return path
    if not os.path.isdir(path) or (path / "config.json").is_file():
        return None
    parts = sorted(file for file in path.iterdir() if is_gguf(file) and file.is_file())
    models = [file for file in parts if not (m := SPLIT.fullmatch(file.name)) or int(m[2]) == 1]
    if len(models) > 1:
        raise CheckpointError(
            f"{path} holds several models: {listing([file.name for file in models])}. Name the "
            "file that is meant."
        )
    if parts and not models:
        raise CheckpointError(f"{path} lacks the first part of {parts[0].name}")
    return models[0] if models else None


SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def read_gguf(path: Path) -> GGUF:
    """The model in the file `path`, and in the parts after it where it is split.

    Raises CheckpointError unless every header is whole, each tensor lies in its file apart from
    the others, and its type is one that is read.
    """
    metadata, tensors = read_header(path)
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return GGUF(path=path, metadata=metadata, tensors=tensors)
    named = SPLIT.fullmatch(path.name)
    if (
        metadata.get("split.no", 0) != 0
        or not named
        or (int(named[2]), int(named[3])) != (1, count)
    ):
        raise CheckpointError(
            f"{path} is part {metadata.get('split.no', 0) + 1} of a model of {count} files; give "
            f"the first, NAME-00001-of-{count:05}.gguf"
        )
    for part in range(1, count):
        file = path.with_name(f"{named[1]}-{part + 1:05}-of-{count:05}.gguf")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: {path.name} says that there are {count}")
        more, held = read_header(file)
        if (more.get("split.no"), more.get("split.count")) != (part, count):
            raise CheckpointError(f"{file} does not say that it is part {part + 1} of {count}")
        if twice := sorted(held.keys() & tensors.keys()):
            raise CheckpointError(f"{file} holds tensors of an earlier part: {listing(twice)}")
        tensors |= held
    if (total := metadata.get("split.tensors.count", len(tensors))) != len(tensors):
        raise CheckpointError(f"{path}: its parts hold {len(tensors)} tensors and should {total}")
    return GGUF(path=path, metadata=metadata, tensors=tensors)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of one file. Raises CheckpointError as read_gguf does."""
    try:
        size = os.path.getsize(path)
        if not size:
            raise CheckpointError(f"{path} is empty")
        with open(path, "rb") as file:
            reader = HeaderReader(path, np.memmap(file, np.uint8, "r").data, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    magic = reader.take(4, "its magic")
    if magic != MAGIC:
        kind = OLDER.get(magic)
        older = f" It is {kind}, which GGUF replaced: convert it with llama.cpp." if kind else ""
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r}.{older}")
    version = reader.scalar(UINT32, "its version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise CheckpointError(
            f"{path} is big-endian; xlinfer reads little-endian GGUF"
            if swapped
            else f"{path} is GGUF version {version}; xlinfer reads 2 and 3"
        )
    tensors, keys = (reader.scalar(UINT64, f"its count of {of}") for of in ("tensors", "keys"))
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string("a key of its metadata")
        if key in metadata:
            raise CheckpointError(f"{path}: its metadata names {key!r} twice")
        metadata[key] = reader.value(reader.scalar(UINT32, f"the type of {key!r}"), repr(key))
    entries = [reader.entry() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, no power of two")
    start = reader.at + -reader.at % alignment
    infos: dict[str, GGUFTensor] = {}
    for entry in entries:
        info = _tensor(path, *entry, start=start, alignment=alignment)
        if info.name in infos:
            raise CheckpointError(f"{path} names tensor {info.name!r} twice")
        infos[info.name] = info
    at, before = start, ""
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset < at:
            raise CheckpointError(f"{path}: tensors {before!r} and {info.name!r} overlap")
        at, before = info.offset + info.nbytes, info.name
        if at > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {info.name!r} ends at byte {at}, the file at {size}"
            )
    return metadata, infos


def _tensor(
    path: Path, name: str, sizes: list[int], kind: int, offset: int, *, start: int, alignment: int
) -> GGUFTensor:
    where = f"{path}: tensor {name!r}"
    if kind not in FLOATS and kind not in BLOCKS:
        what = f"of type {REFUSED[kind]}" if kind in REFUSED else f"of an unknown type, {kind}"
        raise CheckpointError(f"{where} is {what}; xlinfer reads {READ}")
    if offset % alignment:
        raise CheckpointError(f"{where} lies at {offset}, no multiple of the alignment {alignment}")
    blocks, dtype = BLOCKS.get(kind), FLOATS[kind][1] if kind in FLOATS else np.dtype(np.uint8)
    shape = tuple(reversed(sizes))
    if blocks is not None and (not shape or shape[-1] % blocks.elements):
        raise CheckpointError(
            f"{where} is {blocks.name} {list(shape)}, whose rows are not made of blocks of "
            f"{blocks.elements}"
        )
    return GGUFTensor(
        name=name, file=path, dtype=dtype, shape=shape, offset=start + offset, blocks=blocks
    )
