"""GGUF files for tests, written from the format's description and not by what reads them."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "I32": 26, "BF16": 30, "MXFP4": 39}


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value(held: Any) -> bytes:
    """A type and what it is of: uint32, float32, bool, string, or an array of one of them."""
    match held:
        case bool():
            return struct.pack("<I?", 7, held)
        case int():
            return struct.pack("<II", 4, held)
        case float():
            return struct.pack("<If", 6, held)
        case str():
            return struct.pack("<I", 8) + text(held)
        case list():
            each = [value(one) for one in held]
            kind = each[0][:4] if each else struct.pack("<I", 4)
            return (
                struct.pack("<I", 9)
                + kind
                + struct.pack("<Q", len(each))
                + b"".join(one[4:] for one in each)
            )
    raise TypeError(held)


def entry(name: str, kind: int, shape: tuple[int, ...], offset: int) -> bytes:
    """`shape` as Hugging Face has it: the file has the last axis first."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    *,
    version: int = 3,
) -> Path:
    """`tensors`: type, shape and bytes of each."""
    alignment = metadata.get("general.alignment", 32)
    entries, data = [], b""
    for name, (kind, shape, content) in tensors.items():
        entries.append(entry(name, TYPES[kind], shape, len(data)))
        data += content + b"\0" * (-len(content) % alignment)
    keys = b"".join(text(key) + value(held) for key, held in metadata.items())
    counts = struct.pack("<IQQ", version, len(tensors), len(metadata))
    header = b"GGUF" + counts + keys + b"".join(entries)
    path.write_bytes(header + b"\0" * (-len(header) % alignment) + data)
    return path
