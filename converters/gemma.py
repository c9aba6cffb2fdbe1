"""Gemma 1 (2B, 7B): Llama with norms whose weight is 1 + w, a scaled embedding and a gelu; what
Gemma's families share."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What GemmaConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
ABSENT_ROPE_THETA = 10_000.0
# "gelu" stands in Gemma's first files and means its tanh approximation: transformers reads it so.
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "use_bidirectional_attention": (False, None),
}
HARMLESS = frozenset({"cache_implementation"})  # how transformers keeps keys and values


def gemma_config(
    constants: Constants,
    *,
    model_type: str,
    absent_rope_theta: float,
    windows: tuple[int | None, ...] | None = None,
) -> ModelConfig:
    """What Gemma's families read alike."""
    bias = constants.flag("attention_bias")
    config = llama_config(
        constants.having(hidden_act="gelu_pytorch_tanh"),
        model_type=model_type,
        absent_rope_theta=absent_rope_theta,
        windows=windows,
        qkv_bias=bias,
        attention_output_bias=bias,
    )
    return replace(config, norm="rms_offset", embedding_multiplier=config.hidden_size**0.5)


def read_gemma(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), FIXED, ABSENT)
    return gemma_config(
        constants,
        model_type="gemma",
        absent_rope_theta=ABSENT_ROPE_THETA,
    )


GEMMA = Family(model_type="gemma", read=read_gemma, rows=llama_rows, ignored=IGNORED, copies=COPIES)
