"""Qwen3 (dense): Qwen2 without the biases, with an RMSNorm on each head's q and k."""

from collections.abc import Mapping
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.qwen2 import read_windows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What Qwen3Config of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0


def read_qwen3(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS), DECODER_ONLY, ABSENT)
    bias = constants.flag("attention_bias")
    return llama_config(
        constants,
        model_type="qwen3",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=read_windows(constants),
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm="head",
    )


QWEN3 = Family(model_type="qwen3", read=read_qwen3, rows=llama_rows, ignored=IGNORED, copies=COPIES)
