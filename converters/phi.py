"""Phi 1, 1.5 and 2: attention and an MLP without a gate side by side after one LayerNorm, biases
everywhere, the head's included, and a part of each head rotated."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.config import PARTIAL_ROTARY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, LAYER, SIZES, llama_config, llama_rows
from converters.llama import NAMES as LLAMA_NAMES
from converters.rope import KEYS as ROPE_KEYS
from converters.rope import take_rotary_factor
from xlinfer.config import ModelConfig

ALIASES = {"rms_norm_eps": "layer_norm_eps"}
# What PhiConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "gelu_new",
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": None,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0
ABSENT_ROTARY_FACTOR = 0.5
FIXED: Mapping[str, tuple[Any, ...]] = {
    **PARTIAL_ROTARY,
    "qk_layernorm": (False,),
    "tie_word_embeddings": (False,),  # the head has a bias
}
NAMES = {
    **LLAMA_NAMES,
    "norm": "model.final_layernorm",
    "o": f"{LAYER}self_attn.dense",
    "up": f"{LAYER}mlp.fc1",
    "down": f"{LAYER}mlp.fc2",
}


def read_phi(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, ROPE_KEYS), FIXED, ABSENT)
    constants, rotary_factor = take_rotary_factor(constants, ABSENT_ROTARY_FACTOR)
    config = llama_config(
        constants,
        model_type="phi",
        absent_rope_theta=ABSENT_ROPE_THETA,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        rotary_factor=rotary_factor,
    )
    return replace(
        config, norm="layer", gated_mlp=False, parallel=True, shared_norm=True, head_bias=True
    )


PHI = Family(
    model_type="phi",
    read=read_phi,
    rows=partial(llama_rows, names=NAMES),
    ignored=IGNORED,
    copies=COPIES,
)
