"""Models that read images beside text: the text model alone, as a checkpoint of its own."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from converters.errors import CheckpointError
from converters.formats.safetensors import TensorInfo

# model_type -> that of the text model, where text_config does not say.
MULTIMODAL: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
}
# A nested config holds only what differs from its class's defaults. Sizes, which no family takes
# for granted elsewhere.
ABSENT: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "max_position_embeddings": 131_072,
    },
    "llama": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
    },
    "llama4_text": {
        "vocab_size": 202_048, "hidden_size": 5120, "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_local_experts": 16, "num_experts_per_tok": 1, "max_position_embeddings": 131_072,
    },
    "mistral": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 131_072,
    },
    "qwen2": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32_768,
    },
}  # fmt: skip
# What the whole model's config says of its text model too.
CARRIED = ("bos_token_id", "eos_token_id", "quantization_config", "compression_config")
# Names of transformers 4 and of 5 -> those of the text model alone.
TEXT_NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
)
LEFT_OUT = re.compile(
    r"((?:model\.)?(?:vision_tower|vision_model|multi_modal_projector|image_newline))\b.*"
)


class LeftOut(NamedTuple):
    """Of a checkpoint's tensors, those whose names begin with `prefix`."""

    prefix: str
    tensors: int
    nbytes: int


def text_document(path: Path, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of the text model alone, of a `document` that describes one of MULTIMODAL; any
    other is that already. Raises CheckpointError."""
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in MULTIMODAL:
        return document
    nested = document.get("text_config")
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path}: 'text_config' of a {kind} model must be an object")
    own = {"model_type": MULTIMODAL[kind], **nested}
    carried = {name: document[name] for name in CARRIED if document.get(name) is not None}
    text = {**ABSENT.get(own["model_type"], {}), **own, **carried}
    both = (document, nested)
    dtypes = [d[name] for d in both for name in ("dtype", "torch_dtype") if d.get(name)]
    if dtypes:
        text["dtype"] = dtypes[0]
        text.pop("torch_dtype", None)
    # Either may say it: transformers 4 asks the text model's, transformers 5 the whole one's.
    tied = [d["tie_word_embeddings"] for d in both if "tie_word_embeddings" in d]
    return {**text, "tie_word_embeddings": any(tied)} if tied else text


def text_tensors(
    tensors: Mapping[str, TensorInfo],
) -> tuple[dict[str, TensorInfo], tuple[LeftOut, ...]]:
    """The text model's tensors by the names that it has alone, and what belongs to the others.
    What belongs to neither keeps its name."""
    kept: dict[str, TensorInfo] = {}
    groups: dict[str, list[TensorInfo]] = {}
    for name, info in tensors.items():
        if found := LEFT_OUT.fullmatch(name):
            groups.setdefault(found[1], []).append(info)
        else:
            kept[_text_name(name)] = info
    return kept, tuple(
        LeftOut(prefix, len(infos), sum(info.nbytes for info in infos))
        for prefix, infos in sorted(groups.items())
    )


def _text_name(name: str) -> str:
    for whole, alone in TEXT_NAMES:
        if name.startswith(whole):
            return alone + name.removeprefix(whole)
    return name
