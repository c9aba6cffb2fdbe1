"""Qwen3-MoE (Qwen3-30B-A3B, 235B-A22B): Qwen3 with experts in some layers or all."""

from collections.abc import Mapping
from typing import Any

from converters import moe
from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.qwen2 import read_windows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What Qwen3MoeConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    **moe.QWEN_ABSENT,
    "num_key_value_heads": 4,
    "head_dim": None,
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
# Versions of transformers differ in which layers it gives a window; no published model has one.
FIXED: Mapping[str, tuple[Any, ...]] = {**DECODER_ONLY, "use_sliding_window": (False,)}


def read_qwen3_moe(constants: Constants) -> ModelConfig:
    known = known_keys(SIZES, ROPE_KEYS, moe.KEYS, moe.HARMLESS, {"moe_intermediate_size"})
    constants = constants.check(known, FIXED, ABSENT)
    bias = constants.flag("attention_bias")
    return llama_config(
        constants,
        model_type="qwen3_moe",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=read_windows(constants),
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm="head",
        moe=moe.read_moe(
            constants,
            size="moe_intermediate_size",
            norm_topk_prob=constants.flag("norm_topk_prob"),
            shared=None,
            bias=False,
            layers=moe.sparse_layers(constants),
        ),
    )


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    read=read_qwen3_moe,
    rows=lambda config: (*llama_rows(config), *moe.QWEN_EXPERTS),
    ignored=IGNORED,
    copies=COPIES,
)
