"""A converted checkpoint: parameters as Orbax writes them, beside the config and tokenizer.

Reading one back needs no transposes and gives the same bits. Orbax is imported where it is used,
because importing it takes longer than loading a small model.
"""

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from converters import Checkpoint, CheckpointError, open_checkpoint
from converters.errors import listing, read_object
from xlinfer.models import Model

MANIFEST, PARAMETERS = "xlinfer.json", "parameters"
FORMAT_VERSION = 3
# What makes a checkpoint usable beside its weights; copied as they are, where present.
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """xlinfer.json, whose presence makes a folder a converted checkpoint."""

    format_version: int
    dtype: str  # of the model
    parameters: Mapping[str, Any]  # dotted path -> {"shape", "dtype"}
    source_sha256: Mapping[str, str]  # file of the source checkpoint -> hex digest


def is_converted(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError for a manifest of another version, or a folder that anyone may write:
    whoever can write it decides what the model says."""
    file = folder / MANIFEST
    values = read_object(file)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version is {version!r}; this xlinfer reads {FORMAT_VERSION}. Write "
            "it again with python -m xlinfer.convert."
        )
    if os.stat(folder).st_mode & stat.S_IWOTH:
        raise CheckpointError(
            f"{folder} may be written by every user of this machine; chmod o-w it first"
        )
    dtype, held, digests = (values.get(name) for name in ("dtype", "parameters", "source_sha256"))
    if not (isinstance(dtype, str) and isinstance(held, dict) and isinstance(digests, dict)):
        raise CheckpointError(f"{file} is damaged: it lacks dtype, parameters or source_sha256")
    if not all(isinstance(p, dict) and isinstance(p.get("shape"), list) for p in held.values()):
        raise CheckpointError(f"{file} is damaged: a parameter has no shape")
    return Manifest(format_version=version, dtype=dtype, parameters=held, source_sha256=digests)


def read_parameters(
    folder: Path, targets: Mapping[tuple, jax.ShapeDtypeStruct]
) -> dict[tuple, jax.Array]:
    """The arrays at `targets`' paths, cast to their dtypes and placed by their shardings.

    Raises CheckpointError when the folder holds other parameters or shapes, or is damaged.
    """
    import orbax.checkpoint as ocp

    check_parameters(folder, {path: target.shape for path, target in targets.items()})
    names = {path: _dotted(path) for path in targets}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(
                (folder / PARAMETERS).absolute(), {names[p]: t for p, t in targets.items()}
            )
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder}: its parameters cannot be read: {error}") from None
    return {path: arrays[name] for path, name in names.items()}


def read_one(folder: Path, path: tuple[str | int, ...]) -> np.ndarray:
    """One of the arrays, as it was written. Raises CheckpointError where it is damaged."""
    import orbax.checkpoint as ocp

    name = _dotted(path)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            asked = ocp.args.PyTreeRestore(
                item={name: 0},
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
                partial_restore=True,
            )
            return checkpointer.restore((folder / PARAMETERS).absolute(), args=asked)[name]
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder}: its parameter {name} cannot be read: {error}") from None


def check_parameters(folder: Path, shapes: Mapping[tuple, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the folder holds the parameters at `shapes`' paths alone."""
    held = {name: tuple(p["shape"]) for name, p in read_manifest(folder).parameters.items()}
    asked = {_dotted(path): shape for path, shape in shapes.items()}
    wrong = sorted(name for name in {*held, *asked} if held.get(name) != asked.get(name))
    if wrong:
        raise CheckpointError(
            f"{folder}: its parameters are not those of its config.json: "
            + listing([f"{n} is {held.get(n)}, should be {asked.get(n)}" for n in wrong])
        )


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def save_converted(
    model: Model, source: str | Path, directory: str | Path, *, text_only: bool = False
) -> Manifest:
    """Write `model`, loaded from the checkpoint at `source`, into the new `directory`; what was
    loaded with `text_only` becomes a checkpoint of a text model.

    The directory appears whole or not at all. Raises CheckpointError when it holds anything
    already, when `source` is itself converted, or when `model` is not what its config says
    (such as one whose kv heads were repeated for a mesh).
    """
    import orbax.checkpoint as ocp

    checkpoint = open_checkpoint(source, text_only=text_only)
    directory = Path(directory).expanduser().absolute()
    refuse_converted(checkpoint)
    refuse_output(checkpoint, directory)
    if model.cfg != checkpoint.config:
        raise CheckpointError(
            f"the model's config is not that of {checkpoint.path}; save one that was loaded from "
            "there without repeated kv heads (a mesh of at most num_key_value_heads devices)"
        )
    flat = nnx.to_flat_state(nnx.state(model))
    arrays = {_dotted(path): param.get_value() for path, param in flat}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dtype=model.embed_VD.get_value().dtype.name,
        parameters={
            name: {"shape": list(array.shape), "dtype": array.dtype.name}
            for name, array in arrays.items()
        },
        source_sha256=_digests(checkpoint.path),
    )
    with new_directory(directory) as draft:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft / PARAMETERS, arrays)
        copy_beside(checkpoint, draft)
        (draft / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A draft to fill, which becomes `directory` at the end of the block, or is removed."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp's own is for the owner alone
        draft.rename(directory)  # atomic, and refuses a directory that has been filled meanwhile
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def copy_beside(checkpoint: Checkpoint, directory: Path) -> None:
    """Its small files into `directory`: as they are, but config.json where only the text model is
    meant."""
    for name in BESIDE:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)
    if checkpoint.is_part:
        (directory / "config.json").write_text(json.dumps(checkpoint.document, indent=2) + "\n")


def refuse_converted(checkpoint: Checkpoint) -> None:
    if is_converted(checkpoint.path):
        raise CheckpointError(
            f"{checkpoint.path} is converted already; convert its source, or --to=hf"
        )


def refuse_output(checkpoint: Checkpoint, directory: Path) -> None:
    """Raise CheckpointError for what is converted neither way, and for a full `directory`."""
    source = checkpoint.path
    if source.is_file():
        raise CheckpointError(
            f"{source} is a GGUF, which has no config.json to keep beside the parameters; convert "
            "the checkpoint that it was made of"
        )
    if checkpoint.scheme is not None:
        raise CheckpointError(
            f"{source} is quantized ({checkpoint.scheme.name}); only float weights are converted. "
            "It is loaded as it is, packed; to have it elsewhere, copy its folder."
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is not empty; give a new directory")


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the source's files."""
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in BESIDE)
    digests = {}
    for path in files:
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
