"""gpt-oss (20B, 120B) with float weights: experts with biases and a clamped SwiGLU in every layer,
a sink for each head, a window in every other layer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters import moe
from converters.config import (
    DECODER_ONLY,
    Constants,
    every,
    known_keys,
    layer_types,
    windows_of,
)
from converters.family import Family
from converters.llama import COPIES, IGNORED, LAYER, SIZES, llama_config, llama_rows
from converters.llama import NAMES as LLAMA_NAMES
from converters.rope import KEYS as ROPE_KEYS
from converters.rules import Row
from xlinfer.config import ClampedSwiGLU, ModelConfig

# What GptOssConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": None,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 150_000.0
ABSENT_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
FIXED: Mapping[str, tuple[Any, ...]] = {**DECODER_ONLY, "hidden_act": ("silu",)}
# OpenAI's own names, beside those of transformers.
HARMLESS = moe.HARMLESS | {"experts_per_token", "initial_context_length"}
NAMES = {**LLAMA_NAMES, "sinks": f"{LAYER}self_attn.sinks"}
# Gate and up stand by turns, and inputs come first.
EXPERTS = (
    Row("layers.moe.router_DR", f"{LAYER}mlp.router.weight", "R D -> D R"),
    Row("layers.moe.router_bias_R", f"{LAYER}mlp.router.bias", "R -> R"),
    Row(
        "layers.moe.gate_up_EID", f"{LAYER}mlp.experts.gate_up_proj", "E D (I P) -> E (P I) D",
        inputs="D",
    ),
    Row(
        "layers.moe.gate_up_bias_EI", f"{LAYER}mlp.experts.gate_up_proj_bias", "E (I P) -> E (P I)"
    ),
    Row("layers.moe.down_EDI", f"{LAYER}mlp.experts.down_proj", "E I D -> E D I", inputs="I"),
    Row("layers.moe.down_bias_ED", f"{LAYER}mlp.experts.down_proj_bias", "E D -> E D"),
)  # fmt: skip


def read_gpt_oss(constants: Constants) -> ModelConfig:
    known = known_keys(SIZES, ROPE_KEYS, moe.KEYS, HARMLESS)
    constants = constants.check(known, FIXED, ABSENT)
    if constants.get("rope_parameters") is None and constants.get("rope_scaling") is None:
        constants = constants.having(rope_scaling=dict(ABSENT_ROPE))
    bias = constants.flag("attention_bias")
    kinds = layer_types(constants, every(2, constants.integer("num_hidden_layers")))
    config = llama_config(
        constants,
        model_type="gpt_oss",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=windows_of(constants, kinds, constants.optional_integer("sliding_window")),
        qkv_bias=bias,
        attention_output_bias=bias,
        # The softmax over those chosen is that over all, divided by the sum of those chosen.
        moe=moe.read_moe(
            constants, size="intermediate_size", norm_topk_prob=True, shared=None, bias=True
        ),
    )
    act = ClampedSwiGLU(
        alpha=constants.number("swiglu_alpha"), limit=constants.number("swiglu_limit")
    )
    return replace(config, hidden_act=act, sinks=True)


GPT_OSS = Family(
    model_type="gpt_oss",
    read=read_gpt_oss,
    rows=lambda config: (*llama_rows(config, NAMES), *EXPERTS),
    ignored=IGNORED,
    copies=COPIES,
)
