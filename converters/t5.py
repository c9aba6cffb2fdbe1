"""T5 1.0, 1.1 and Flan-T5: distances in buckets for positions, RMSNorm, no biases, scores that are
not scaled, and an MLP of one relu (1.0) or with a gate (1.1)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.config import ENCODER_DECODER, Constants, known_keys
from converters.encoder_decoder import decoder_start, encoder_decoder_rows
from converters.errors import CheckpointError
from converters.family import Family
from converters.llama import SIZES, llama_config
from converters.rules import Row
from xlinfer.config import Encoder, ModelConfig, RelativePositions

ALIASES = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "head_dim": "d_kv",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_decoder_layers",
    "rms_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "n_positions",
    "num_encoder_layers": "num_layers",
}
# What T5Config of transformers puts where the file is silent. Buckets have no bound: n_positions is
# what the published models were trained on. scale_decoder_outputs None is tie_word_embeddings.
ABSENT: Mapping[str, Any] = {
    "num_hidden_layers": None,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,
    "pad_token_id": 0,
    "num_key_value_heads": None,
}
FIXED: Mapping[str, tuple[Any, ...]] = {
    **ENCODER_DECODER,
    "num_key_value_heads": (None,),  # transformers does not read it
}
# Dropout; what follows from feed_forward_proj.
HARMLESS = frozenset(
    """
    dropout_rate classifier_dropout initializer_factor dense_act_fn is_gated_act output_past
    """.split()
)
MLPS = {  # feed_forward_proj -> the activation and whether there is a gate
    "relu": ("relu", False),
    "gated-gelu": ("gelu_new", True),
    "gated-silu": ("silu", True),
}
COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}
# Old files hold it, and no code reads it: only self-attention knows distances.
IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)


def read_t5(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    known = known_keys(SIZES, HARMLESS, {"num_encoder_layers", "head_dim"})
    constants = constants.check(known, FIXED, ABSENT)
    encoder_layers = constants.integer("num_encoder_layers")
    if constants.get("num_hidden_layers") is None:
        constants = constants.having(num_hidden_layers=encoder_layers)
    act, is_gated = constants.choice("feed_forward_proj", MLPS)
    config = llama_config(constants.having(hidden_act=act), model_type="t5", absent_rope_theta=None)
    scaled = constants.flag(
        "tie_word_embeddings"
        if constants.get("scale_decoder_outputs") is None
        else "scale_decoder_outputs"
    )
    relative = RelativePositions(
        num_buckets=constants.integer("relative_attention_num_buckets", least=4),
        max_distance=constants.integer("relative_attention_max_distance"),
    )
    if relative.num_buckets % 2 or relative.max_distance <= relative.num_buckets // 2:
        raise CheckpointError(
            f"{constants.where}: relative_attention_num_buckets {relative.num_buckets} must be "
            f"even, and relative_attention_max_distance {relative.max_distance} above half of it"
        )
    return replace(
        config,
        gated_mlp=is_gated,
        attention_scale=1.0,
        logits_divisor=config.hidden_size**0.5 if scaled else 1.0,
        encoder=Encoder(
            num_layers=encoder_layers,
            decoder_start_token_id=decoder_start(constants, constants.get("pad_token_id")),
            relative_positions=relative,
            fits_float16=False,
        ),
    )


def t5_rows(config: ModelConfig) -> tuple[Row, ...]:
    relative = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    distances = tuple(
        Row(f"{stack}.distance_BN", f"{stack}.{relative}", "B N -> B N")
        for stack in ("encoder", "decoder")
    )
    encoder, decoder = _names(config, "encoder", 1), _names(config, "decoder", 2)
    block = "decoder.block.{layer}.layer.1."
    cross = _attention(f"{block}EncDecAttention", f"{block}layer_norm")
    return (
        *encoder_decoder_rows(config, encoder=encoder, decoder=decoder, cross=cross),
        *distances,
    )


def _names(config: ModelConfig, stack: str, mlp: int) -> Mapping[str, str]:
    """`mlp` is the number of the layer's MLP among its parts."""
    block = f"{stack}.block.{{layer}}.layer."
    dense = f"{block}{mlp}.DenseReluDense."
    return {
        "embed": "shared",
        "norm": f"{stack}.final_layer_norm",
        "head": "lm_head",
        **_attention(f"{block}0.SelfAttention", f"{block}0.layer_norm"),
        "mlp_norm": f"{block}{mlp}.layer_norm",
        "gate": f"{dense}wi_0",
        "up": f"{dense}{'wi_1' if config.gated_mlp else 'wi'}",
        "down": f"{dense}wo",
    }


def _attention(name: str, norm: str) -> Mapping[str, str]:
    return {"attn_norm": norm, **{part: f"{name}.{part}" for part in "qkvo"}}


T5 = Family(model_type="t5", read=read_t5, rows=t5_rows, ignored=IGNORED, copies=COPIES)
