"""safetensors on disk: a length, a JSON header, then the tensors' bytes.

Everything about a file is proven from its header before any tensor is read; a tensor is then a
read-only view of the file. (The safetensors package has no numpy reader for FP8.)
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError, listing, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LENGTH_BYTES = 8  # little-endian size of the header, before it
MAX_HEADER_BYTES = 100_000_000  # the format's own bound

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies. `offset` is in bytes from the start of `file`."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensor(info: TensorInfo) -> np.ndarray:
    """A read-only view of the file, `info.shape` and `info.dtype`; pages load as they are read.

    Raises CheckpointError when the file has become shorter or has gone since its header was read.
    """
    if info.nbytes == 0:  # nothing to map
        return np.empty(info.shape, info.dtype)
    try:
        data = np.memmap(info.file, np.uint8, "r", info.offset, (info.nbytes,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{info.file}: cannot read tensor {info.name!r}: {error}") from None
    return np.asarray(data).view(info.dtype).reshape(info.shape)


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of `model.safetensors`, or of the shards that its index names.

    Raises CheckpointError for a folder without either, and for any shard or tensor that the
    index and the files do not agree on.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} holds both {SINGLE} and {INDEX}, and which one is meant cannot be told. "
            "Remove the one that is stale."
        )
    if index.is_file():
        return _read_shards(index)
    if single.is_file():
        return read_header(single)
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if others:
        return (
            f"{folder} has neither {SINGLE} nor {INDEX}, but {listing(others)}. xlinfer reads "
            "the layout that transformers' save_pretrained writes, and a GGUF that is named itself."
        )
    if pickles:
        return (
            f"{folder} has its weights only as pickles ({listing(pickles)}). A pickle runs code "
            "when it is opened, so xlinfer never opens one. Convert it where you trust it: "
            "transformers' AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) "
            "writes safetensors."
        )
    return f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there."


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    document = read_object(index)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must be an object, tensor name to file name")
    for name, file in weight_map.items():
        if not is_plain(file):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {file!r}, which is not a plain "
                "*.safetensors file name. Every shard must lie beside its index."
            )
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        shard = index.parent / file
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing: {index.name} names it")
        held = read_header(shard)
        stray = sorted(name for name in held if weight_map.get(name) != file)
        if stray:
            raise CheckpointError(
                f"{shard} holds tensors that {index.name} does not place there: {listing(stray)}"
            )
        tensors |= held
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise CheckpointError(
            f"{index} names tensors that their shards lack: "
            + listing([f"{name} (in {weight_map[name]})" for name in lost])
        )
    return tensors


def is_plain(file: Any) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and not any(c in file for c in "/\\:\0")
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, in the order of their bytes.

    Raises CheckpointError unless the header is whole and its tensors tile the file exactly.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > size - LENGTH_BYTES or length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: its header is said to be {length} "
                    f"bytes, the file has {size} and a header at most {MAX_HEADER_BYTES}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    header = read_object(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: '__metadata__' must be an object of strings")
    start = LENGTH_BYTES + length
    infos = [_entry(path, name, entry, start) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    at = start
    for info in infos:
        if info.offset != at:
            raise CheckpointError(
                f"{path}: tensor {info.name!r} starts at byte {info.offset - start} of the data, "
                f"where the one before it ends at {at - start}: tensors must follow each other "
                "without overlap or gap"
            )
        at += info.nbytes
        if at > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {info.name!r} ends at byte {at}, the file at {size}"
            )
    if at != size:
        raise CheckpointError(f"{path}: its tensors end at byte {at}, the file at {size}")
    return {info.name: info for info in infos}


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype!r}; xlinfer reads {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise CheckpointError(f"{where} has shape {shape!r}, not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}, not [begin, end]")
    begin, end = offsets
    info = TensorInfo(
        name=name, file=path, dtype=DTYPES[dtype], shape=tuple(shape), offset=start + begin
    )
    if info.nbytes != end - begin:
        raise CheckpointError(
            f"{where} is {dtype} {shape}, which takes {info.nbytes} bytes; its data_offsets span "
            f"{end - begin}"
        )
    return info


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
