"""StarCoder2: Llama with LayerNorm, biases everywhere and an MLP without a gate."""

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

ALIASES = {"rms_norm_eps": "norm_epsilon"}
# What Starcoder2Config of transformers puts where the file is silent; null means no window.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": None,
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "use_bias": True,
    "tie_word_embeddings": True,
}
ABSENT_ROPE_THETA = 10_000.0
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "norm_type": ("layer_norm",),
    "mlp_type": ("default",),
    "scale_attn_weights": (True,),
}
# Dropout, and what the published files keep of the code that trained the models.
HARMLESS = frozenset(
    """
    residual_dropout embedding_dropout activation_function layer_norm_epsilon
    attention_softmax_in_fp32 scale_attention_softmax_in_fp32
    """.split()
)
NAMES = {**LLAMA_NAMES, "up": f"{LAYER}mlp.c_fc", "down": f"{LAYER}mlp.c_proj"}


def read_starcoder2(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), FIXED, ABSENT)
    bias, window = constants.flag("use_bias"), constants.optional_integer("sliding_window")
    config = llama_config(
        constants,
        model_type="starcoder2",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=(window,) * constants.integer("num_hidden_layers"),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )
    return replace(config, norm="layer", gated_mlp=False)


STARCODER2 = Family(
    model_type="starcoder2",
    read=read_starcoder2,
    rows=partial(llama_rows, names=NAMES),
    ignored=IGNORED,
    copies=COPIES,
)
