"""What tells a job's model from others: two that differ here may answer differently."""

import hashlib
from pathlib import Path
from typing import Any

from xlinfer.hub import commit_of, is_repository
from xlinfer.serve.build import EngineOptions

# Of the engine's options, those that change results. The others change speed, or bits within the
# rounding of the arithmetic.
DECIDING = (
    *("dtype", "quantization", "kv_cache_dtype", "max_model_len", "attention_impl", "matmul_impl"),
    *("text_only", "deterministic", "seed"),
)
WEIGHTS = (".safetensors", ".gguf")
SMALL = (".json", ".jinja", ".model", ".txt")  # config, tokenizer, chat template


def identity_of(options: EngineOptions) -> dict[str, Any]:
    """Of the folders, names, small files' digests and weights' sizes; of a repository of the hub,
    its commit. Raises CheckpointError, OSError."""
    made: dict[str, Any] = {name: getattr(options, name) for name in DECIDING}
    if options.model is not None:
        made["model"] = _source(options.model, options.revision)
    if options.artifact is not None:
        made["artifact"] = _source(options.artifact, None)
    if options.tokenizer is not None:
        made["tokenizer"] = _source(options.tokenizer, None)
    if options.chat_template is not None:
        made["chat_template"] = _digest(Path(options.chat_template))
    return made


def _source(source: str, revision: str | None) -> dict[str, Any]:
    if is_repository(source):
        return {"repository": source, "commit": commit_of(source, revision)}
    path = Path(source).expanduser()
    if path.is_file():
        return {"name": path.name, "bytes": path.stat().st_size}
    files = sorted(file for file in path.iterdir() if file.is_file())
    return {
        file.name: file.stat().st_size if file.suffix in WEIGHTS else _digest(file)
        for file in files
        if file.suffix in WEIGHTS or file.name.endswith(SMALL)
    }


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
