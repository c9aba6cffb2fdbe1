"""BLOOM: ALiBi in place of a rope, LayerNorm, of the embedding too, biases, an MLP without a gate,
and q, k and v in one tensor by turns of heads."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import SIZES, Linear, llama_config, llama_rows
from xlinfer.config import ModelConfig

ALIASES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layer_norm_epsilon",
}
# What BloomConfig of transformers puts where the file is silent. It knows no seq_length: ALiBi has
# no bound, and the published models were trained on 2,048 tokens.
ABSENT: Mapping[str, Any] = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "num_key_value_heads": None,
    "head_dim": None,
}
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "apply_residual_connection_post_layernorm": (False,),
    # transformers reads neither.
    "num_key_value_heads": (None,),
    "head_dim": (None,),
}
# Dropout; how the training code split, fused and ordered its products.
HARMLESS = frozenset(
    """
    hidden_dropout pretraining_tp slow_but_exact attention_softmax_in_fp32 bias_dropout_fusion
    masked_softmax_fusion offset_alibi skip_bias_add skip_bias_add_qkv unk_token_id
    """.split()
)
LAYER = "transformer.h.{layer}."
QKV = f"{LAYER}self_attention.query_key_value"
NAMES = {
    "embed": "transformer.word_embeddings",
    "embed_norm": "transformer.word_embeddings_layernorm",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": f"{LAYER}input_layernorm",
    "mlp_norm": f"{LAYER}post_attention_layernorm",
    "q": Linear(QKV, "(N H|H|H)", 0),
    "k": Linear(QKV, "(K H|H|H)", 1),
    "v": Linear(QKV, "(K H|H|H)", 2),
    "o": f"{LAYER}self_attention.dense",
    "up": f"{LAYER}mlp.dense_h_to_4h",
    "down": f"{LAYER}mlp.dense_4h_to_h",
}


def read_bloom(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES - {"intermediate_size"}, HARMLESS), FIXED, ABSENT)
    config = llama_config(
        constants.having(
            hidden_act="gelu_new", intermediate_size=4 * constants.integer("hidden_size")
        ),
        model_type="bloom",
        absent_rope_theta=None,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    return replace(config, norm="layer", gated_mlp=False, alibi_scale=1.0, embedding_norm=True)


BLOOM = Family(
    model_type="bloom",
    read=read_bloom,
    rows=partial(llama_rows, names=NAMES),
    prefix="transformer.",
    ignored=(),
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
)
