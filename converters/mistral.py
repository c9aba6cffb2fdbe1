"""Mistral 7B, Nemo, Small and everything published as model_type "mistral"."""

from collections.abc import Mapping
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What MistralConfig of transformers puts where the file is silent; null means no window.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0
# The family has no biases: transformers reads neither key.
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "attention_bias": (False,),
    "mlp_bias": (False,),
}


def read_mistral(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS), FIXED, ABSENT)
    window = constants.optional_integer("sliding_window")
    return llama_config(
        constants,
        model_type="mistral",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=(window,) * constants.integer("num_hidden_layers"),
    )


MISTRAL = Family(
    model_type="mistral", read=read_mistral, rows=llama_rows, ignored=IGNORED, copies=COPIES
)
