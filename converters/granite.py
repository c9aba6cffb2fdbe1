"""Granite 3 (dense): Llama with multipliers of the embedding, the scores, what layers add, and the
logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters import llama
from converters.config import Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What GraniteConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    **llama.ABSENT,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def read_granite(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS), llama.FIXED, ABSENT)
    bias = constants.flag("attention_bias")
    config = llama_config(
        constants,
        model_type="granite",
        absent_rope_theta=llama.ABSENT_ROPE_THETA,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=constants.flag("mlp_bias"),
    )
    return replace(
        config,
        embedding_multiplier=constants.number("embedding_multiplier"),
        attention_scale=constants.number("attention_multiplier"),
        residual_multiplier=constants.number("residual_multiplier"),
        logits_divisor=constants.number("logits_scaling"),
    )


GRANITE = Family(
    model_type="granite", read=read_granite, rows=llama_rows, ignored=IGNORED, copies=COPIES
)
