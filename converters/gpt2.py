"""GPT-2: learned positions in place of a rope, LayerNorm, biases everywhere, an MLP without a gate,
q, k and v in one tensor, and weights that have their inputs first."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import SIZES, Linear, llama_config, llama_rows
from xlinfer.config import ModelConfig

ALIASES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
# What GPT2Config of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "hidden_act": "gelu_new",
    "rms_norm_eps": 1e-5,
    "intermediate_size": None,
    "tie_word_embeddings": True,
    "num_key_value_heads": None,
    "head_dim": None,
}
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    # transformers reads neither.
    "num_key_value_heads": (None,),
    "head_dim": (None,),
}
# A classifier's head.
SUMMARY = frozenset(
    """
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    """.split()
)
# Dropout, the order of operations in half precision, a copy of n_positions.
HARMLESS = frozenset({"attn_pdrop", "reorder_and_upcast_attn", "n_ctx"})
LAYER = "transformer.h.{layer}."
NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": f"{LAYER}ln_1",
    "mlp_norm": f"{LAYER}ln_2",
    **{
        part: Linear(f"{LAYER}attn.c_attn", "(N|K|K H)", piece, inputs_first=True)
        for piece, part in enumerate("qkv")
    },
    "o": Linear(f"{LAYER}attn.c_proj", inputs_first=True),
    "up": Linear(f"{LAYER}mlp.c_fc", inputs_first=True),
    "down": Linear(f"{LAYER}mlp.c_proj", inputs_first=True),
}


def read_gpt2(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, HARMLESS, SUMMARY), FIXED, ABSENT)
    if constants.get("intermediate_size") is None:
        constants = constants.having(intermediate_size=4 * constants.integer("hidden_size"))
    config = llama_config(
        constants,
        model_type="gpt2",
        absent_rope_theta=None,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    return replace(config, norm="layer", gated_mlp=False, learned_positions=True)


GPT2 = Family(
    model_type="gpt2",
    read=read_gpt2,
    rows=partial(llama_rows, names=NAMES),
    prefix="transformer.",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # the causal mask
    copies={"lm_head.weight": "transformer.wte.weight"},
)
