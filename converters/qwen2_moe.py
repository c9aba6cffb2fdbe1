"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): Qwen2 with experts, one of which every token
passes, in some layers or all."""

from collections.abc import Mapping
from typing import Any

from converters import moe
from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, LAYER, SIZES, llama_config, llama_rows
from converters.qwen2 import read_windows
from converters.rope import KEYS as ROPE_KEYS
from converters.rules import Row
from xlinfer.config import ModelConfig

# What Qwen2MoeConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    **moe.QWEN_ABSENT,
    "num_key_value_heads": 16,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "qkv_bias": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0
# Versions of transformers differ in which layers it gives a window; no published model has one.
FIXED: Mapping[str, tuple[Any, ...]] = {**DECODER_ONLY, "use_sliding_window": (False,)}
EXPERT_SIZES = ("moe_intermediate_size", "shared_expert_intermediate_size")
SHARED = (
    Row("layers.moe.shared_gate_D1", f"{LAYER}mlp.shared_expert_gate.weight", "1 D -> D 1"),
    *moe.shared_rows("mlp.shared_expert"),
)


def read_qwen2_moe(constants: Constants) -> ModelConfig:
    known = known_keys(SIZES, ROPE_KEYS, moe.KEYS, moe.HARMLESS, EXPERT_SIZES)
    constants = constants.check(known, FIXED, ABSENT)
    return llama_config(
        constants,
        model_type="qwen2_moe",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=read_windows(constants),
        qkv_bias=constants.flag("qkv_bias"),
        moe=moe.read_moe(
            constants,
            size="moe_intermediate_size",
            norm_topk_prob=constants.flag("norm_topk_prob"),
            shared=constants.integer("shared_expert_intermediate_size"),
            bias=False,
            layers=moe.sparse_layers(constants),
        ),
    )


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    read=read_qwen2_moe,
    rows=lambda config: (*llama_rows(config), *moe.QWEN_EXPERTS, *SHARED),
    ignored=IGNORED,
    copies=COPIES,
)
