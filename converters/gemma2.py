"""Gemma 2: Gemma with norms after attention and MLP too, a window in every other layer, and soft
caps on the logits and on attention's scores."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from converters import gemma
from converters.config import Constants, every, known_keys, layer_types, windows_of
from converters.family import Family
from converters.llama import COPIES, IGNORED, LAYER, SIZES, llama_rows
from converters.llama import NAMES as LLAMA_NAMES
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What Gemma2Config of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    **gemma.ABSENT,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
HARMLESS = gemma.HARMLESS | {"sliding_window_size"}  # a copy of sliding_window; never read
NAMES = {
    **LLAMA_NAMES,
    "attn_post_norm": f"{LAYER}post_attention_layernorm",
    "mlp_norm": f"{LAYER}pre_feedforward_layernorm",
    "mlp_post_norm": f"{LAYER}post_feedforward_layernorm",
}


def gemma2_config(
    constants: Constants, *, model_type: str, absent_rope_theta: float, kinds: Sequence[str]
) -> ModelConfig:
    """What Gemma 2 and 3 read alike; `kinds` are the layers'."""
    config = gemma.gemma_config(
        constants,
        model_type=model_type,
        absent_rope_theta=absent_rope_theta,
        windows=windows_of(constants, kinds, constants.optional_integer("sliding_window")),
    )
    return replace(
        config,
        post_norm=True,
        attention_scale=constants.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=constants.optional_number("attn_logit_softcapping"),
        logit_softcap=constants.optional_number("final_logit_softcapping"),
    )


def read_gemma2(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), gemma.FIXED, ABSENT)
    return gemma2_config(
        constants,
        model_type="gemma2",
        absent_rope_theta=gemma.ABSENT_ROPE_THETA,
        kinds=layer_types(constants, every(2, constants.integer("num_hidden_layers"))),
    )


GEMMA2 = Family(
    model_type="gemma2",
    read=read_gemma2,
    rows=partial(llama_rows, names=NAMES),
    ignored=IGNORED,
    copies=COPIES,
)
