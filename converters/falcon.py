"""Falcon, the 7B models: attention and an MLP without a gate side by side after one LayerNorm, one
kv head, and q, k and v in one tensor."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import SIZES, Linear, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

ALIASES = {
    "hidden_act": "activation",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "layer_norm_epsilon",
}
# What FalconConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "intermediate_size": None,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "bias": False,
    "tie_word_embeddings": True,
    "num_key_value_heads": None,
    "head_dim": None,
}
ABSENT_ROPE_THETA = 10_000.0
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    # The 1B and RW models have ALiBi, other heads and two norms, those from 11B on another layout.
    "alibi": (False,),
    "multi_query": (True,),
    "new_decoder_architecture": (False,),
    "parallel_attn": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    # transformers reads neither.
    "num_key_value_heads": (None,),
    "head_dim": (None,),
}
# Of the other layouts alone.
HARMLESS = frozenset({"num_kv_heads", "num_ln_in_parallel_attn"})
LAYER = "transformer.h.{layer}."
QKV = f"{LAYER}self_attention.query_key_value"
NAMES = {
    "embed": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": f"{LAYER}input_layernorm",
    **{part: Linear(QKV, "(N|K|K H)", piece) for piece, part in enumerate("qkv")},
    "o": f"{LAYER}self_attention.dense",
    "up": f"{LAYER}mlp.dense_h_to_4h",
    "down": f"{LAYER}mlp.dense_4h_to_h",
}


def read_falcon(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), FIXED, ABSENT)
    if constants.get("intermediate_size") is None:
        constants = constants.having(intermediate_size=4 * constants.integer("hidden_size"))
    bias = constants.flag("bias")
    config = llama_config(
        constants,
        model_type="falcon",
        absent_rope_theta=ABSENT_ROPE_THETA,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )
    return replace(
        config, norm="layer", gated_mlp=False, parallel=True, shared_norm=True, num_kv_heads=1
    )


FALCON = Family(
    model_type="falcon",
    read=read_falcon,
    rows=partial(llama_rows, names=NAMES),
    prefix="transformer.",
    ignored=(),
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
)
