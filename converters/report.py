"""What a checkpoint is, from its headers alone: plain data, as JSON has it.

One that cannot be loaded is reported as far as it is understood, and what refuses it is said.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converters import (
    Checkpoint,
    CheckpointError,
    PackedStep,
    TensorInfo,
    open_checkpoint,
    parameter_rules,
    read_config,
    weight_forms,
)
from converters.families import FAMILIES
from converters.formats.gguf import GGUFTensor, find_gguf, read_gguf
from converters.formats.safetensors import read_folder
from converters.gguf_tensors import ROPE
from converters.quantization import KEYS
from converters.rules import STACKED
from xlinfer.config import ModelConfig

Report = dict[str, Any]
LAYER = re.compile(r"(.*?\.)(\d+)\.(.+)")  # the first number of a name counts layers
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
EXPERT = re.compile(r"(?<=experts\.)\d+(?=\.)")
KV_SCALE = re.compile(r".*\b(k_scale|v_scale|kv_scale|[kv]_proj\.output_scale)")


def report(path: str | Path, *, text_only: bool = False) -> Report:
    """All that can be said of the checkpoint in the folder, or of the GGUF, at `path`.

    "refused" says why it cannot be loaded; None: its headers are whole and fit its config. What
    could not be found out is None. Raises CheckpointError where there is no such path.
    """
    try:
        checkpoint = open_checkpoint(path, text_only=text_only)
    except CheckpointError as error:
        place = Path(path).expanduser()
        if not place.exists() or (place.is_file() and find_gguf(place) is None):
            raise
        return _unknown(place, str(error))
    config, refused, roles = checkpoint.config, None, {}
    tensors = _try(lambda: checkpoint.tensors) or {}
    try:
        roles = roles_of(checkpoint)
    except CheckpointError as error:
        refused = str(error)
    return {
        **_head(checkpoint.path, checkpoint.document, tensors),
        "parameters": sum(math.prod(rule.shape) for rule in parameter_rules(config)),
        "config": _sizes(config),
        "scheme": checkpoint.scheme.name if checkpoint.scheme else None,
        "head": _tied(checkpoint, tensors),
        "generation": {
            k: v for k, v in asdict(checkpoint.generation).items() if v not in (None, ())
        },
        "groups": _groups(tensors.values(), roles),
        "ignored": [] if refused else ignored(checkpoint, tensors, roles),
        "refused": refused,
    }


def _unknown(place: Path, refused: str) -> Report:
    """Of what is not understood, the headers."""
    file = _try(lambda: find_gguf(place))
    gguf = file and _try(lambda: read_gguf(file))
    if gguf:
        tensors = gguf.tensors
        document = {"model_type": gguf.metadata.get("general.architecture")}
    else:
        tensors = _try(lambda: read_folder(place)) or {} if place.is_dir() else {}
        document = (_try(lambda: read_config(place)) if place.is_dir() else None) or {}
    return {
        **_head(file or place, document, tensors),
        "parameters": None,
        "config": None,
        "scheme": _method(document),
        "head": None,
        "generation": None,
        "groups": _groups(tensors.values(), {}),
        "ignored": [],
        "refused": refused,
    }


def _try[T](read: Callable[[], T]) -> T | None:
    try:
        return read()
    except CheckpointError:
        return None


def _head(path: Path, document: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Report:
    files: dict[str, int] = {}
    totals: dict[str, dict[str, int]] = {}
    for info in tensors.values():
        files[info.file.name] = files.get(info.file.name, 0) + info.nbytes
        total = totals.setdefault(_dtype(info), {"tensors": 0, "numbers": 0, "bytes": 0})
        total["tensors"] += 1
        total["numbers"] += math.prod(info.shape)
        total["bytes"] += info.nbytes
    scales = sorted(NUMBER.sub("*", name) for name in tensors if KV_SCALE.fullmatch(name))
    return {
        "path": str(path),
        "model_type": document.get("model_type"),
        "bytes": sum(files.values()),
        "files": files,
        "totals": totals,
        "kv_scales": {name: scales.count(name) for name in dict.fromkeys(scales)},
    }


def _method(document: Mapping[str, Any]) -> str | None:
    found = [document[key] for key in KEYS if isinstance(document.get(key), dict)]
    return str(found[0].get("quant_method")) if found else None


def _dtype(info: TensorInfo) -> str:
    blocks = info.blocks if isinstance(info, GGUFTensor) else None
    return info.dtype.name if blocks is None else blocks.name


def _sizes(config: ModelConfig) -> Report:
    """The config with what layers share said once, by layers."""
    values = asdict(config)
    values.pop("model_type")
    values.pop("weight_forms")  # the groups of tensors show them
    for name in ("ropes", "windows", "attention_chunk_sizes"):
        each = getattr(config, name)
        of = {value: [i for i, v in enumerate(each) if v == value] for value in dict.fromkeys(each)}
        values[name] = [
            {"layers": ranges(layers), "value": _rope(value) if name == "ropes" else value}
            for value, layers in of.items()
        ]
    if config.moe is not None:
        values["moe"]["layers"] = ranges(config.moe.layers)
    return values


def _rope(rope: Any) -> Report | None:
    return None if rope is None else {"kind": type(rope).__name__, **asdict(rope)}


def ranges(numbers: Iterable[int]) -> str:
    """ "0-4, 6" of 0, 1, 2, 3, 4 and 6."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def roles_of(checkpoint: Checkpoint) -> dict[str, dict[str, str | None]]:
    """By tensor: the parameters that are made of it, and the form of each; None: floats. Raises
    CheckpointError for a checkpoint that cannot be loaded."""
    config = checkpoint.config
    forms = weight_forms(config, checkpoint.scheme, str(checkpoint.path))
    roles: dict[str, dict[str, str | None]] = {}
    for step in checkpoint.schedule(compare_copies=False):
        form = forms.get(step.rule.target)
        said = form.describe() if form else None
        if isinstance(step, PackedStep) and form is None:
            said = f"floats: {step.packing.why}" if step.packing.why else "floats"
        name = ".".join(n for n in step.rule.target if isinstance(n, str) and n != STACKED)
        for part, info in step.tensors.items():
            role = name if part == "weight" else f"{name} ({part})"
            roles.setdefault(info.name, {})[role] = said
    return roles


def _groups(
    infos: Iterable[TensorInfo], roles: Mapping[str, Mapping[str, str | None]]
) -> list[Report]:
    """Tensors by layer, and layers whose tensors are alike together."""
    layers: dict[tuple[str, int | None], dict[tuple, list[TensorInfo]]] = {}
    for info in infos:
        found = LAYER.fullmatch(info.name)
        prefix, layer, rest = (found[1], int(found[2]), found[3]) if found else ("", None, "")
        name = EXPERT.sub("*", rest) if found else info.name
        alike = name, tuple(roles.get(info.name, {}).items()), _dtype(info), info.shape, info.nbytes
        layers.setdefault((prefix, layer), {}).setdefault(alike, []).append(info)
    equal: dict[tuple, list[tuple[int | None, list[TensorInfo]]]] = {}
    for (prefix, layer), held in layers.items():
        rows = sorted(((*alike, len(infos)) for alike, infos in held.items()), key=repr)
        all_infos = [info for infos in held.values() for info in infos]
        equal.setdefault((prefix, tuple(rows)), []).append((layer, all_infos))
    groups = []
    for (prefix, rows), members in equal.items():
        held = [info for _, infos in members for info in infos]
        numbers = [layer for layer, _ in members if layer is not None]
        group = {
            "prefix": prefix,
            "layers": ranges(numbers) if numbers else None,
            "bytes": sum(info.nbytes for info in held),
            "files": sorted({info.file.name for info in held}),
            "tensors": [_row(*row) for row in rows],  # of one layer
        }
        groups.append((prefix, min(numbers, default=-1), group))
    return [group for *_, group in sorted(groups, key=lambda g: g[:2])]


def _row(
    name: str, roles: tuple[tuple[str, str | None], ...], dtype: str, shape: tuple[int, ...],
    nbytes: int, count: int,
) -> Report:  # fmt: skip
    forms = dict.fromkeys(form for _, form in roles if form is not None)
    return {
        "name": name,  # "*" for the number of an expert
        "count": count,
        "roles": [role for role, _ in roles],
        "dtype": dtype,
        "form": "; ".join(forms) or None,
        "shape": list(shape),
        "bytes": nbytes * count,
    }


def _tied(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> str:
    if not checkpoint.config.tie_word_embeddings:
        return "its own"
    copies = FAMILIES[checkpoint.config.model_type].copies
    return "the embedding" + (", and a copy of it is stored" if copies.keys() & tensors else "")


def ignored(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], roles: Mapping[str, Any]
) -> list[Report]:
    """What is stored and not read, by why. All tensors have a place that can be ignored."""
    family = FAMILIES[checkpoint.config.model_type]
    found: dict[tuple[str, str], list[int]] = {}
    for name, info in tensors.items():
        if name in roles or info.name in roles:
            continue
        original = family.copies.get(name) or family.copies.get(family.prefix + name)
        why = f"a copy of {original}" if original else "no weight: it is derived, or never read"
        found.setdefault((NUMBER.sub("*", name), why), []).append(info.nbytes)
    rows = [
        {"name": name, "count": len(sizes), "bytes": sum(sizes), "why": why}
        for (name, why), sizes in found.items()
    ]
    for prefix, count, nbytes in checkpoint.left_out:
        rows.append(
            {"name": f"{prefix}*", "count": count, "bytes": nbytes, "why": "no part of the text"}
        )
    if checkpoint.path.is_file():
        for name, info in read_gguf(checkpoint.path).tensors.items():
            if ROPE.fullmatch(name):
                why = "a table of the rope, read with the config"
                rows.append({"name": name, "count": 1, "bytes": info.nbytes, "why": why})
    return rows
