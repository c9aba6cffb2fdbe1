"""Phi-3, 3.5 and 4, and their mini models: Llama with q, k and v in one tensor, gate and up in
another, and ropes stretched by a divisor for each frequency."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from converters.config import PARTIAL_ROTARY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, LAYER, SIZES, Linear, llama_config, llama_rows
from converters.llama import NAMES as LLAMA_NAMES
from converters.rope import KEYS as ROPE_KEYS
from converters.rope import take_rotary_factor
from xlinfer.config import ModelConfig

# What Phi3Config of transformers puts where the file is silent; null means no window.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": None,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0
# The published files hold these; transformers reads none of them.
FIXED: Mapping[str, tuple[Any, ...]] = {
    **PARTIAL_ROTARY,
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}
QKV, GATE_UP = f"{LAYER}self_attn.qkv_proj", f"{LAYER}mlp.gate_up_proj"
NAMES = {
    **LLAMA_NAMES,
    **{part: Linear(QKV, "(N|K|K H)", piece) for piece, part in enumerate("qkv")},
    **{part: Linear(GATE_UP, "(F|F)", piece) for piece, part in enumerate(("gate", "up"))},
}


def read_phi3(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS), FIXED, ABSENT)
    constants, rotary_factor = take_rotary_factor(constants, absent=1.0)
    window = constants.optional_integer("sliding_window")
    return llama_config(
        constants,
        model_type="phi3",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=(window,) * constants.integer("num_hidden_layers"),
        rotary_factor=rotary_factor,
    )


PHI3 = Family(
    model_type="phi3",
    read=read_phi3,
    rows=partial(llama_rows, names=NAMES),
    ignored=IGNORED,
    copies=COPIES,
)
