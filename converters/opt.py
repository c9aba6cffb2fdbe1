"""OPT but 350M: learned positions, which begin in the table's third row, LayerNorm, biases
everywhere and an MLP of one relu."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.errors import CheckpointError
from converters.family import Family
from converters.llama import SIZES, Linear, llama_config, llama_rows
from xlinfer.config import ModelConfig

ALIASES = {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"}
# What OPTConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "hidden_act": "relu",
    "word_embed_proj_dim": None,
    "enable_bias": True,
    "tie_word_embeddings": True,
    "num_key_value_heads": None,
    "head_dim": None,
}
NORM_EPS = 1e-5  # torch's, which no file states
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "do_layer_norm_before": (True,),
    "_remove_final_layer_norm": (False,),
    "layer_norm_elementwise_affine": (True,),
    # transformers reads neither.
    "num_key_value_heads": (None,),
    "head_dim": (None,),
}
HARMLESS = frozenset({"dropout", "activation_dropout", "layerdrop", "init_std"})
LAYER = "model.decoder.layers.{layer}."
NAMES = {
    "embed": "model.decoder.embed_tokens",
    "positions": Linear("model.decoder.embed_positions", "(1|1|M)", 2),
    "norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
    "attn_norm": f"{LAYER}self_attn_layer_norm",
    "mlp_norm": f"{LAYER}final_layer_norm",
    "q": f"{LAYER}self_attn.q_proj",
    "k": f"{LAYER}self_attn.k_proj",
    "v": f"{LAYER}self_attn.v_proj",
    "o": f"{LAYER}self_attn.out_proj",
    "up": f"{LAYER}fc1",
    "down": f"{LAYER}fc2",
}


def read_opt(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, HARMLESS), FIXED, ABSENT)
    bias, hidden = constants.flag("enable_bias"), constants.integer("hidden_size")
    if constants.optional_integer("word_embed_proj_dim") not in (None, hidden):
        raise CheckpointError(
            f"{constants.where}: 'word_embed_proj_dim' is not hidden_size, {hidden}: xlinfer does "
            "not project embeddings"
        )
    config = llama_config(
        constants.having(rms_norm_eps=NORM_EPS),
        model_type="opt",
        absent_rope_theta=None,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )
    return replace(config, norm="layer", gated_mlp=False, learned_positions=True)


OPT = Family(
    model_type="opt",
    read=read_opt,
    rows=partial(llama_rows, names=NAMES),
    prefix="model.",
    ignored=(),
    copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
)
