"""BART: learned positions, which begin in the table's third row, LayerNorm of the embedding and
after each part, biases everywhere, and one of the logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.config import ENCODER_DECODER, Constants, known_keys
from converters.encoder_decoder import decoder_start, encoder_decoder_rows
from converters.errors import CheckpointError
from converters.family import Family
from converters.llama import SIZES, Linear, llama_config
from converters.rules import Row
from xlinfer.config import Encoder, ModelConfig

ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "decoder_layers",
    "num_attention_heads": "decoder_attention_heads",
    "intermediate_size": "decoder_ffn_dim",
    "hidden_act": "activation_function",
}
# What BartConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "decoder_start_token_id": 2,
    "num_key_value_heads": None,
    "head_dim": None,
}
NORM_EPS = 1e-5  # torch's, which no file states
FIXED: Mapping[str, tuple[Any, ...]] = {
    **ENCODER_DECODER,
    "normalize_before": (False,),
    "normalize_embedding": (True,),
    "add_final_layer_norm": (False,),
    "add_bias_logits": (False,),
    "static_position_embeddings": (False,),
    # transformers reads neither.
    "num_key_value_heads": (None,),
    "head_dim": (None,),
}
SAME = {  # of the encoder: xlinfer computes one of the decoder's sizes
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}
# Dropout and training; extra_pos_embeddings is the table's third row, which is so for all.
HARMLESS = frozenset(
    """
    activation_dropout classif_dropout classifier_dropout decoder_layerdrop dropout
    encoder_layerdrop extra_pos_embeddings force_bos_token_to_be_generated gradient_checkpointing
    init_std output_past save_step _num_labels
    """.split()
)
COPIES = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
    "lm_head.weight": "model.shared.weight",
}


def read_bart(constants: Constants) -> ModelConfig:
    # transformers 4 writes the encoder's layers a second time.
    constants = replace(constants.having(num_hidden_layers=...), aliases=ALIASES)
    constants = constants.check(
        known_keys(SIZES, HARMLESS, SAME, {"encoder_layers"}), FIXED, ABSENT
    )
    for name, own in SAME.items():
        if constants.integer(name) != constants.integer(own):
            raise CheckpointError(
                f"{constants.where}: {name!r} is {constants.get(name)} and {constants.key(own)!r} "
                f"{constants.get(own)}; xlinfer computes an encoder of the decoder's sizes"
            )
    config = llama_config(
        constants.having(rms_norm_eps=NORM_EPS),
        model_type="bart",
        absent_rope_theta=None,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    return replace(
        config,
        norm="layer",
        pre_norm=False,
        gated_mlp=False,
        learned_positions=True,
        embedding_norm=True,
        embedding_multiplier=config.hidden_size**0.5 if constants.flag("scale_embedding") else 1.0,
        head_bias=True,
        encoder=Encoder(
            num_layers=constants.integer("encoder_layers"),
            decoder_start_token_id=decoder_start(constants, None),
            relative_positions=None,
            fits_float16=True,
        ),
    )


def bart_rows(config: ModelConfig) -> tuple[Row, ...]:
    cross = _attention("model.decoder.layers.{layer}.encoder_attn")
    return (
        *encoder_decoder_rows(
            config, encoder=_names("encoder"), decoder=_names("decoder"), cross=cross
        ),
        Row("head_bias_V", "final_logits_bias", "1 V -> (1 V)"),
    )


def _names(stack: str) -> Mapping[str, str | Linear]:
    layer = f"model.{stack}.layers.{{layer}}."
    return {
        "embed": "model.shared",
        "positions": Linear(f"model.{stack}.embed_positions", "(1|1|M)", 2),
        "embed_norm": f"model.{stack}.layernorm_embedding",
        "norm": f"model.{stack}.layer_norm",  # mBART's: BART has none
        "head": "lm_head",
        **_attention(f"{layer}self_attn"),
        "mlp_norm": f"{layer}final_layer_norm",
        "up": f"{layer}fc1",
        "down": f"{layer}fc2",
    }


def _attention(name: str) -> Mapping[str, str]:
    parts = {part: f"{name}.{part}_proj" for part in "qkv"}
    return {"attn_norm": f"{name}_layer_norm", **parts, "o": f"{name}.out_proj"}


BART = Family(
    model_type="bart",
    read=read_bart,
    rows=bart_rows,
    prefix="model.",
    ignored=(),
    copies=COPIES,
    zeros=("final_logits_bias",),
)
