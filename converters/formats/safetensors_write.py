"""safetensors written in place: headers first, then each tensor's bytes where they belong, in any
order and of any size.

The layout is what save_pretrained writes: model.safetensors, or shards and their index.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np

from converters.formats.safetensors import DTYPES, INDEX, LENGTH_BYTES, SINGLE, TensorInfo

SHARD_BYTES = 5 * 10**9  # transformers' own "5GB"; a larger tensor has a file of its own
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Tensors = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def lay_out(folder: Path, tensors: Tensors, most: int = SHARD_BYTES) -> dict[str, TensorInfo]:
    """Where each tensor is to lie in the files of `folder`, layer after layer, in files of at
    most `most` bytes of tensors. Writes nothing."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors, key=_by_number):
        dtype, shape = tensors[name]
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    placed = {}
    for i, names in enumerate(shards):
        one = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        # Wide ones first, so that each begins at a multiple of its width.
        names.sort(key=lambda name: -tensors[name][0].itemsize)
        at = LENGTH_BYTES + len(_header(names, tensors))
        for name in names:
            dtype, shape = tensors[name]
            info = TensorInfo(name=name, file=folder / one, dtype=dtype, shape=shape, offset=at)
            placed[name] = info
            at += info.nbytes
    return placed


def _by_number(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _header(names: Iterable[str], tensors: Tensors) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for name in names:
        dtype, shape = tensors[name]
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_headers(placed: Mapping[str, TensorInfo]) -> None:
    """The files that lay_out planned, with zeros for all tensors, and the index of several."""
    infos = list(placed.values())
    tensors = {info.name: (info.dtype, info.shape) for info in infos}
    for path, members in groupby(infos, key=lambda info: info.file):
        held = list(members)
        header = _header([info.name for info in held], tensors)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
            file.truncate(LENGTH_BYTES + len(header) + sum(info.nbytes for info in held))
    if len({info.file for info in infos}) > 1:
        document = {
            "metadata": {"total_size": sum(info.nbytes for info in infos)},
            "weight_map": {info.name: info.file.name for info in infos},
        }
        (infos[0].file.parent / INDEX).write_text(json.dumps(document, indent=2) + "\n")


def writable(info: TensorInfo) -> np.ndarray:
    """The tensor in its file, `info.shape` and `info.dtype`: what is put there is written."""
    if info.nbytes == 0:
        return np.empty(info.shape, info.dtype)
    data = np.memmap(info.file, np.uint8, "r+", info.offset, (info.nbytes,))
    return np.asarray(data).view(info.dtype).reshape(info.shape)
