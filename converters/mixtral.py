"""Mixtral 8x7B and 8x22B: Mistral with experts in every layer, whose weights add up to 1."""

from collections.abc import Mapping
from typing import Any

from converters import mistral, moe
from converters.config import Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What MixtralConfig of transformers puts where the file is silent; null means no window.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 1_000_000.0
EXPERTS = moe.expert_rows("block_sparse_moe", "w1", "w3", "w2")


def read_mixtral(constants: Constants) -> ModelConfig:
    known = known_keys(SIZES, ROPE_KEYS, moe.KEYS, moe.HARMLESS)
    constants = constants.check(known, mistral.FIXED, ABSENT)
    window = constants.optional_integer("sliding_window")
    return llama_config(
        constants,
        model_type="mixtral",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=(window,) * constants.integer("num_hidden_layers"),
        moe=moe.read_moe(
            constants, size="intermediate_size", norm_topk_prob=True, shared=None, bias=False
        ),
    )


MIXTRAL = Family(
    model_type="mixtral",
    read=read_mixtral,
    rows=lambda config: (*llama_rows(config), *EXPERTS),
    ignored=IGNORED,
    copies=COPIES,
)
