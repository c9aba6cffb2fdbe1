"""OLMo 2: Llama with norms after attention and MLP instead of before, and q and k normalized over
all heads together."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, LAYER, SIZES, llama_config, llama_rows
from converters.llama import NAMES as LLAMA_NAMES
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What Olmo2Config of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0
NAMES = {
    **LLAMA_NAMES,
    "attn_post_norm": f"{LAYER}post_attention_layernorm",
    "mlp_post_norm": f"{LAYER}post_feedforward_layernorm",
}


def read_olmo2(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS), DECODER_ONLY, ABSENT)
    bias = constants.flag("attention_bias")
    config = llama_config(
        constants,
        model_type="olmo2",
        absent_rope_theta=ABSENT_ROPE_THETA,
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm="all",
    )
    return replace(config, pre_norm=False, post_norm=True)


OLMO2 = Family(
    model_type="olmo2",
    read=read_olmo2,
    rows=partial(llama_rows, names=NAMES),
    ignored=IGNORED,
    copies=COPIES,
)
