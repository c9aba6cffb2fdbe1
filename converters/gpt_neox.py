"""GPT-NeoX and Pythia: attention and an MLP without a gate side by side, a LayerNorm for each,
biases, q, k and v in one tensor by turns of heads, and a part of each head rotated."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.config import PARTIAL_ROTARY, Constants, known_keys
from converters.family import Family
from converters.llama import SIZES, Linear, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from converters.rope import take_rotary_factor
from xlinfer.config import ModelConfig

ALIASES = {
    "rms_norm_eps": "layer_norm_eps",
    "rope_theta": "rotary_emb_base",
    "partial_rotary_factor": "rotary_pct",
}
# What GPTNeoXConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "partial_rotary_factor": None,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "num_key_value_heads": None,
    "head_dim": None,
}
ABSENT_ROPE_THETA = 10_000.0
ABSENT_ROTARY_FACTOR = 0.25
FIXED: Mapping[str, tuple[Any, ...]] = {
    **PARTIAL_ROTARY,
    # transformers reads neither.
    "num_key_value_heads": (None,),
    "head_dim": (None,),
}
HARMLESS = frozenset({"classifier_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"})
LAYER = "gpt_neox.layers.{layer}."
QKV = f"{LAYER}attention.query_key_value"
NAMES = {
    "embed": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
    "attn_norm": f"{LAYER}input_layernorm",
    "mlp_norm": f"{LAYER}post_attention_layernorm",
    "q": Linear(QKV, "(N H|H|H)", 0),
    "k": Linear(QKV, "(K H|H|H)", 1),
    "v": Linear(QKV, "(K H|H|H)", 2),
    "o": f"{LAYER}attention.dense",
    "up": f"{LAYER}mlp.dense_h_to_4h",
    "down": f"{LAYER}mlp.dense_4h_to_h",
}


def read_gpt_neox(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), FIXED, ABSENT)
    constants, rotary_factor = take_rotary_factor(constants, ABSENT_ROTARY_FACTOR)
    bias = constants.flag("attention_bias")
    config = llama_config(
        constants,
        model_type="gpt_neox",
        absent_rope_theta=ABSENT_ROPE_THETA,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        rotary_factor=rotary_factor,
    )
    parallel = constants.flag("use_parallel_residual")
    return replace(config, norm="layer", gated_mlp=False, parallel=parallel)


GPT_NEOX = Family(
    model_type="gpt_neox",
    read=read_gpt_neox,
    rows=partial(llama_rows, names=NAMES),
    # The causal mask, and what is derived.
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
)
