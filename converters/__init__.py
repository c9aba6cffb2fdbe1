"""A checkpoint on disk -> ModelConfig and named parameters. One short table per family. No jax.

`open_checkpoint(folder)` reads config.json alone; the headers of the weight files are read, and
proven whole, when `.tensors` is first asked for, and tensors one at a time with `read_tensor`.
Of a GGUF, which has its constants beside its tensors, the header is read at once.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from converters import gguf
from converters.config import read_generation
from converters.errors import CheckpointError, read_object
from converters.families import FAMILIES, parse_config
from converters.formats.gguf import GGUFTensor, find_gguf, read_gguf, read_gguf_tensor
from converters.formats.packing import Scheme, check_all_match
from converters.formats.safetensors import TensorInfo, read_folder
from converters.formats.safetensors import read_tensor as read_safetensor
from converters.kv_scales import unused
from converters.multimodal import LeftOut, text_document, text_tensors
from converters.packed import form_of_rule, packings, with_weight_forms
from converters.quantization import APART, BESIDE, KEYS, read_kv_scales, read_scheme
from converters.rules import Cut, Layout, Rule, cut_out, expand
from converters.schedule import AnyStep, PackedStep, ScaleStep, Step, schedule
from xlinfer.config import GenerationConfig, ModelConfig
from xlinfer.forms import Form

__all__ = [
    "AnyStep",
    "Checkpoint",
    "CheckpointError",
    "Cut",
    "Layout",
    "LeftOut",
    "PackedStep",
    "Rule",
    "ScaleStep",
    "Scheme",
    "Step",
    "TensorInfo",
    "cut_out",
    "open_checkpoint",
    "parameter_rules",
    "parse_config",
    "read_config",
    "read_model",
    "read_scheme",
    "read_tensor",
    "text_document",
    "weight_forms",
]
COMPARE_BYTES = 16 << 20  # of two tensors at a time


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    path: Path
    document: Mapping[str, Any]  # config.json; the text model's own where only that is meant
    is_part: bool  # only the text model of what is in the folder is meant
    config: ModelConfig
    generation: GenerationConfig
    scheme: Scheme | None  # how its weights are quantized; None: they are floats

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name, shape, dtype and place of every tensor. Raises CheckpointError; reads no data."""
        return self._parts[0]

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """The tensors of the folder that are no part of what is meant. Raises CheckpointError."""
        return self._parts[1]

    @property
    def unused_scales(self) -> tuple[str, ...]:
        """The tensors that are scales which nothing is computed with. Raises CheckpointError."""
        return unused(self.tensors)

    @cached_property
    def _parts(self) -> tuple[Mapping[str, TensorInfo], tuple[LeftOut, ...]]:
        tensors = read_folder(self.path)
        return text_tensors(tensors) if self.is_part else (tensors, ())

    def schedule(
        self, kv_replicas: int = 1, scheme: Scheme | None = None, *, compare_copies: bool = True
    ) -> tuple[AnyStep, ...]:
        """Every tensor with its place among the parameters, in the order of files and bytes;
        by `scheme`, or the checkpoint's own where None.

        Raises CheckpointError unless each tensor has one place, each parameter its tensors, and
        all shapes and dtypes fit; and when a copy, such as a tied head, is there and is none, or
        a bias of zeros, as AutoGPTQ wrote them for models without, is of others. These two alone
        take more than headers: they are not read unless `compare_copies`.
        """
        family, tensors = FAMILIES[self.config.model_type], self.tensors
        if not any(name.startswith(family.prefix) for name in tensors):
            tensors = {family.prefix + name: info for name, info in tensors.items()}
        rules = tuple(
            rule
            for rule in parameter_rules(self.config, kv_replicas, scheme or self.scheme)
            if not all(name in family.zeros and name not in tensors for name in rule.sources)
        )
        placed = {name for rule in rules for name in rule.sources}
        copies = {name: of for name, of in family.copies.items() if name not in placed}
        for name, original in copies.items():
            if compare_copies and name in tensors and original in tensors:
                self._check_copy(tensors[name], tensors[original])
        self._check_listed(rules, tensors)
        biases = [
            name
            for name in self._biases_left_over(rules, tensors)
            if not compare_copies or not read_tensor(tensors[name]).any()
        ]
        left_out = {*copies, *unused(tensors), *biases}
        return schedule(
            rules,
            scheme or self.scheme,
            {name: info for name, info in tensors.items() if name not in left_out},
            (*family.ignored, *(_mtp_layers(self.config) if family.has_mtp_layers else ())),
            self.path,
        )

    def _biases_left_over(
        self, rules: tuple[Rule, ...], tensors: Mapping[str, TensorInfo]
    ) -> list[str]:
        """Those beside packed matrices of which the model has none."""
        sources = {source for rule in rules for source in rule.sources}
        extra = [name for name in tensors if name.endswith(".bias") and name not in sources]
        if self.scheme is None or not extra:
            return []
        packed = {s.removesuffix(".weight") for r in rules for s in packings(r, self.scheme)}
        return [name for name in extra if name.removesuffix(".bias") in packed]

    def _check_listed(self, rules: tuple[Rule, ...], tensors: Mapping[str, TensorInfo]) -> None:
        """Raise CheckpointError where the quantization_config leaves out modules there are not."""
        if self.scheme is not None and self.scheme.listed:
            names = [*tensors, *(source for rule in rules for source in rule.sources), "lm_head."]
            modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
            where = f"{self.path}: what its {self.scheme.name} config leaves out"
            check_all_match(self.scheme.listed, modules, where)

    def _check_copy(self, copy: TensorInfo, original: TensorInfo) -> None:
        same = (copy.dtype, copy.shape) == (original.dtype, original.shape)
        if same:
            a, b = (read_tensor(t).reshape(-1).view(np.uint8) for t in (copy, original))
            starts = range(0, len(a), COMPARE_BYTES)
            same = all(
                np.array_equal(a[i : i + COMPARE_BYTES], b[i : i + COMPARE_BYTES]) for i in starts
            )
        if not same:
            why, own = "config.json makes them one", "Remove the tensor if it is not meant."
            if self.config.tie_word_embeddings:
                why = "tie_word_embeddings is true"
                own = "Say tie_word_embeddings: false if the head is its own, or remove the tensor."
            raise CheckpointError(
                f"{self.path}: {why}, but {copy.name!r} is there and differs from "
                f"{original.name!r}. {own}"
            )


def _mtp_layers(config: ModelConfig) -> tuple[str, ...]:
    """The one after the last: no published model has more."""
    return (rf"model\.layers\.{config.num_layers}\..*",)


@dataclass(frozen=True, kw_only=True)
class GGUFCheckpoint(Checkpoint):
    """`path` is the file; the tensors have the names of their family."""

    renamed: Mapping[str, TensorInfo]

    @cached_property
    def _parts(self) -> tuple[Mapping[str, TensorInfo], tuple[LeftOut, ...]]:
        return self.renamed, ()


def read_tensor(info: TensorInfo) -> np.ndarray:
    """`info.shape` and `info.dtype` (of a GGUF's blocks: their bytes), read-only; a view of the
    file where nothing has to be undone.

    Raises CheckpointError when the file has become shorter or has gone since its header was read.
    """
    return read_gguf_tensor(info) if isinstance(info, GGUFTensor) else read_safetensor(info)


def open_checkpoint(path: str | Path, *, text_only: bool = False) -> Checkpoint:
    """The checkpoint in the folder `path`: config.json and, where present, generation_config.json.
    With `text_only`, of a model that reads images beside text, its text model alone.
    Or the GGUF at `path`: the file, the first one of a split model, or a folder of one model.

    Raises CheckpointError when there is no such folder, or its config.json or metadata is missing,
    not understood, or of a family that is not known.
    """
    folder = Path(path).expanduser()
    if os.path.exists(folder) and (file := find_gguf(folder)) is not None:
        return _open_gguf(file)
    if os.path.isfile(folder):
        raise CheckpointError(f"{folder} is a file; give the folder that holds it and config.json")
    if not os.path.isdir(folder):  # unlike Path's, never raises
        hint = (
            f" If it is a name on the Hugging Face hub: hf download {path} --local-dir DIR, then "
            "give DIR."
            if str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
            else ""
        )
        raise CheckpointError(f"there is no folder {str(path)!r}; this reads local ones.{hint}")
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no config.json; a checkpoint is a folder with config.json and weights "
            "in safetensors, as save_pretrained writes it"
        )
    whole = read_config(folder)
    document = text_document(file, whole) if text_only else whole
    config = read_model(file, document)
    return Checkpoint(
        path=folder,
        document=document,
        is_part=document is not whole,
        config=config,
        generation=read_generation(folder, document, config.encoder),
        scheme=read_scheme(str(file), document),
    )


def read_model(path: Path, document: Mapping[str, Any]) -> ModelConfig:
    """parse_config's, with layers told apart whose weights lie in different forms. Raises
    CheckpointError."""
    config, scheme = parse_config(path, document), read_scheme(str(path), document)
    config = replace(config, kv_scales=read_kv_scales(str(path), document))
    if config.kv_scales and (config.mla is not None or config.encoder is not None):
        raise CheckpointError(
            f"{path}: its quantization_config speaks of a KV cache of 8 bits, and xlinfer reads no "
            f"scales of {'latents' if config.encoder is None else 'an encoder-decoder model'}"
        )
    if scheme is None:
        return config
    return with_weight_forms(config, parameter_rules(config, scheme=scheme), scheme)


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json of `folder`, with what old writers put into a file beside it; or of a GGUF, what
    its metadata amounts to. Raises CheckpointError."""
    if (file := find_gguf(folder)) is not None:
        return _with_blocks(*gguf.read_model(read_gguf(file)))
    values = read_object(folder / "config.json")
    if all(values.get(name) is None for name in KEYS):
        for name, method in BESIDE.items():
            if (folder / name).is_file():
                found = {"quant_method": method, **read_object(folder / name)}
                return {**values, KEYS[0]: found}
    return values


def weight_forms(
    config: ModelConfig, scheme: Scheme | None, where: str, kv_replicas: int = 1
) -> dict[tuple, Form]:
    """The form of each parameter that is not of floats, by its path. Raises CheckpointError,
    beginning with `where`, for what `scheme` cannot hold."""
    if scheme is None:
        return {}
    forms = {}
    for rule in parameter_rules(config, kv_replicas, scheme):
        if held := packings(rule, scheme):
            forms[rule.target] = form_of_rule(rule, held, where)
    return {target: form for target, form in forms.items() if form is not None}


def _open_gguf(path: Path) -> GGUFCheckpoint:
    file = read_gguf(path)
    values, tensors = gguf.read_model(file)
    document = _with_blocks(values, tensors)
    return GGUFCheckpoint(
        path=path,
        document=document,
        is_part=False,
        config=read_model(path, document),
        generation=gguf.read_generation(file),
        scheme=read_scheme(str(path), document),
        renamed=tensors,
    )


def _with_blocks(values: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> Mapping[str, Any]:
    """A GGUF's config.json with the blocks of its tensors as quantization_config."""
    types = {name: info.blocks.name for name, info in tensors.items() if info.blocks is not None}
    return {**values, KEYS[0]: {"quant_method": "gguf", "types": types}} if types else values


def parameter_rules(
    config: ModelConfig, kv_replicas: int = 1, scheme: Scheme | None = None
) -> tuple[Rule, ...]:
    """Each parameter of the Transformer of `config`: its shape and the tensors that make it, in a
    checkpoint whose weights are held by `scheme`.

    `config` is the checkpoint's own; with `kv_replicas` > 1 every kv head stands that many times
    in the parameter, for meshes with more devices than kv heads.
    """
    family = FAMILIES[config.model_type]
    apart = family.rows_apart if scheme is not None and scheme.name in APART else None
    return expand((apart or family.rows)(config), config, kv_replicas)
