"""StableLM 3B, Zephyr and StableLM 2: Llama with LayerNorm, of whose heads a part is rotated, and
in some models with MLP and attention side by side."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.config import PARTIAL_ROTARY, Constants, known_keys
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from converters.rope import take_rotary_factor
from xlinfer.config import ModelConfig

ALIASES = {"rms_norm_eps": "layer_norm_eps"}
# What StableLmConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": None,
    "use_qkv_bias": False,
    "use_parallel_residual": False,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0
ABSENT_ROTARY_FACTOR = 0.25
FIXED: Mapping[str, tuple[Any, ...]] = {
    **PARTIAL_ROTARY,
    "qk_layernorm": (False,),
    "head_dim": (None,),  # transformers does not read it
}


def read_stablelm(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, ROPE_KEYS), FIXED, ABSENT)
    constants, rotary_factor = take_rotary_factor(constants, ABSENT_ROTARY_FACTOR)
    parallel = constants.flag("use_parallel_residual")
    config = llama_config(
        constants,
        model_type="stablelm",
        absent_rope_theta=ABSENT_ROPE_THETA,
        qkv_bias=constants.flag("use_qkv_bias"),
        rotary_factor=rotary_factor,
    )
    return replace(config, norm="layer", parallel=parallel, shared_norm=parallel)


STABLELM = Family(
    model_type="stablelm", read=read_stablelm, rows=llama_rows, ignored=IGNORED, copies=COPIES
)
