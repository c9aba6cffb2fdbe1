"""A checkpoint with float weights, Hugging Face's or a converted one -> a folder of safetensors
that transformers loads: bit for bit what it was made of, by names, shapes and dtypes.

Files are laid out first, and each tensor is then written in its place. Of a converted checkpoint
one parameter is in memory at a time (one matrix of all layers of a stack), of another a tensor.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters import (
    Checkpoint,
    Step,
    TensorInfo,
    parameter_rules,
    read_tensor,
)
from converters.errors import listing
from converters.formats.safetensors_write import SHARD_BYTES, lay_out, writable, write_headers
from converters.rules import put_back
from xlinfer.converted import (
    check_parameters,
    copy_beside,
    is_converted,
    new_directory,
    read_manifest,
    read_one,
    refuse_output,
)
from xlinfer.progress import Progress

logger = logging.getLogger(__name__)


def export(
    checkpoint: Checkpoint,
    directory: Path,
    dtype: np.dtype | None,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, TensorInfo]:
    """Write `checkpoint` into the new `directory`, as `dtype` or as it is; what was written, by
    names.

    A tied head is not written, even where the source holds a copy of it. The directory appears
    whole or not at all. Raises CheckpointError for a checkpoint that is quantized or malformed.
    """
    refuse_output(checkpoint, directory)
    with new_directory(directory) as draft:
        placed = plan_export(checkpoint, draft, dtype, shard_bytes)
        write_headers(placed)
        if is_converted(checkpoint.path):
            _invert(checkpoint, placed, progress)
        else:
            _copy(checkpoint, placed, progress)
        copy_beside(checkpoint, draft)
        _say_dtype(draft / "config.json", placed)
    return placed


def plan_export(
    checkpoint: Checkpoint, directory: Path, dtype: np.dtype | None,
    shard_bytes: int = SHARD_BYTES, *, compare_copies: bool = True,
) -> dict[str, TensorInfo]:  # fmt: skip
    """Where each tensor will lie, proven on headers. Raises CheckpointError, with `compare_copies`
    also where what should be a copy of a tensor is none."""
    found: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    if is_converted(checkpoint.path):
        rules = parameter_rules(checkpoint.config)
        check_parameters(checkpoint.path, {rule.target: rule.shape for rule in rules})
        held = read_manifest(checkpoint.path).parameters
        for rule in rules:
            own = np.dtype(held[".".join(map(str, rule.target))]["dtype"])
            for source in rule.sources:
                found[source] = dtype or own, rule.source_shape
    else:
        for name, info in _sources(checkpoint, compare_copies).items():
            found[name] = dtype or info.dtype, info.shape
    return lay_out(directory, found, shard_bytes)


def _sources(checkpoint: Checkpoint, compare_copies: bool = False) -> dict[str, TensorInfo]:
    """By the names of the family's table, which some files shorten."""
    steps = checkpoint.schedule(compare_copies=compare_copies)
    return {s.rule.sources[s.source]: s.tensor for s in steps if isinstance(s, Step)}


def _copy(checkpoint: Checkpoint, placed: Mapping[str, TensorInfo], progress: Progress) -> None:
    total, done = sum(info.nbytes for info in placed.values()), 0
    progress("write", 0, total)
    for name, source in _sources(checkpoint).items():
        writable(placed[name])[...] = read_tensor(source)
        done += placed[name].nbytes
        progress("write", done, total)


def _invert(checkpoint: Checkpoint, placed: Mapping[str, TensorInfo], progress: Progress) -> None:
    rules = parameter_rules(checkpoint.config)
    nbytes = lambda rule: math.prod(rule.shape) * placed[rule.sources[0]].dtype.itemsize
    total, done = sum(map(nbytes, rules)), 0
    written = Counter[str]()
    progress("write", 0, total)
    for rule in rules:
        array = read_one(checkpoint.path, rule.target)
        for source, start in zip(rule.sources, rule.starts, strict=True):
            at = tuple(slice(a, a + n) for a, n in zip(start, rule.layout.slot, strict=True))
            put_back(writable(placed[source]), array[at], rule)
            written[source] += math.prod(rule.layout.slot)
        done += nbytes(rule)
        progress("write", done, total)
    if lost := [name for name, n in written.items() if n < math.prod(placed[name].shape)]:
        logger.warning(
            "%s: the rows that no token reads are zeros, as they are not among the parameters: %s",
            checkpoint.path,
            listing(lost),
        )


def _say_dtype(file: Path, placed: Mapping[str, TensorInfo]) -> None:
    """What config.json says of the dtype, where it is another now: transformers loads as it
    says."""
    sizes = Counter[str]()
    for info in placed.values():
        sizes[info.dtype.name] += info.nbytes
    document = json.loads(file.read_bytes())
    key = "dtype" if "dtype" in document else "torch_dtype"
    most = sizes.most_common(1)[0][0]
    if document.get(key) not in (None, most):
        file.write_text(json.dumps({**document, key: most}, indent=2) + "\n")
