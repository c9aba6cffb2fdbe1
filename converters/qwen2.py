"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and windows that are usually off."""

from collections.abc import Mapping
from typing import Any

from converters.config import (
    DECODER_ONLY,
    LAYER_TYPES,
    Constants,
    known_keys,
    layer_types,
    windows_of,
)
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What Qwen2Config of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0
FIXED: Mapping[str, tuple[Any, ...]] = {**DECODER_ONLY, "use_mrope": (False,)}


def read_windows(constants: Constants) -> tuple[int | None, ...]:
    """Each layer's window: by layer_types, or where that is null from max_window_layers on.

    Raises CheckpointError when layer_types asks for windows that use_sliding_window denies.
    """
    layers = constants.integer("num_hidden_layers")
    used = constants.flag("use_sliding_window")
    window = constants.optional_integer("sliding_window") if used else None
    first = constants.integer("max_window_layers", 0)
    has_window = lambda layer: window is not None and layer >= first
    absent = [LAYER_TYPES[has_window(layer)] for layer in range(layers)]
    return windows_of(constants, layer_types(constants, absent), window)


def read_qwen2(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS), FIXED, ABSENT)
    return llama_config(
        constants,
        model_type="qwen2",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=read_windows(constants),
        qkv_bias=True,
    )


QWEN2 = Family(model_type="qwen2", read=read_qwen2, rows=llama_rows, ignored=IGNORED, copies=COPIES)
