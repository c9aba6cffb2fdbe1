"""The families xlinfer knows, by the model_type of their config.json."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.bart import BART
from converters.bloom import BLOOM
from converters.config import Constants
from converters.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from converters.errors import CheckpointError
from converters.falcon import FALCON
from converters.family import Family
from converters.gemma import GEMMA
from converters.gemma2 import GEMMA2
from converters.gemma3 import GEMMA3_TEXT
from converters.gpt2 import GPT2
from converters.gpt_bigcode import GPT_BIGCODE
from converters.gpt_neox import GPT_NEOX
from converters.gpt_oss import GPT_OSS
from converters.granite import GRANITE
from converters.llama import LLAMA
from converters.llama4 import LLAMA4_TEXT
from converters.mistral import MISTRAL
from converters.mixtral import MIXTRAL
from converters.multimodal import MULTIMODAL
from converters.olmo2 import OLMO2
from converters.opt import OPT
from converters.phi import PHI
from converters.phi3 import PHI3
from converters.quantization import KEYS
from converters.qwen2 import QWEN2
from converters.qwen2_moe import QWEN2_MOE
from converters.qwen3 import QWEN3
from converters.qwen3_moe import QWEN3_MOE
from converters.smollm3 import SMOLLM3
from converters.stablelm import STABLELM
from converters.starcoder2 import STARCODER2
from converters.t5 import T5
from xlinfer.config import ModelConfig

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        BART,
        BLOOM,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        FALCON,
        GEMMA,
        GEMMA2,
        GEMMA3_TEXT,
        GPT2,
        GPT_BIGCODE,
        GPT_NEOX,
        GPT_OSS,
        GRANITE,
        LLAMA,
        LLAMA4_TEXT,
        MISTRAL,
        MIXTRAL,
        OLMO2,
        OPT,
        PHI,
        PHI3,
        QWEN2,
        QWEN2_MOE,
        QWEN3,
        QWEN3_MOE,
        SMOLLM3,
        STABLELM,
        STARCODER2,
        T5,
    )
}


def parse_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """The config that the object `values`, read from `path`, describes.

    Raises CheckpointError for an unknown model_type, and any key that is missing, unknown or out of
    range. How its weights are quantized is for quantization.py to read.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: 'model_type' must name the family: {_supported()}")
    if model_type in MULTIMODAL:
        raise CheckpointError(
            f"{path}: model_type {model_type!r} reads images beside text, which xlinfer does not. "
            "--text_only (in Python text_only=True) takes its text model alone and leaves out the "
            "rest."
        )
    if model_type not in FAMILIES and values.get("auto_map") is not None:
        raise CheckpointError(
            f"{path}: model_type {model_type!r} is computed by code of its own ('auto_map'), which "
            f"xlinfer never runs. It knows {_supported()}."
        )
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type.lower(), FAMILIES, n=3, cutoff=0.5)
        guess = f" The nearest: {', '.join(near)}." if near else ""
        raise CheckpointError(
            f"{path}: xlinfer does not know model_type {model_type!r}.{guess} "
            f"It knows {_supported()}."
        )
    plain = {name: value for name, value in values.items() if name not in KEYS}
    return FAMILIES[model_type].read(Constants(str(path), plain))


def _supported() -> str:
    return ", ".join(FAMILIES)
