"""Llama 1, 2, 3.x and everything published as model_type "llama"; the table the others share."""

from collections.abc import Mapping
from typing import Any

from converters.config import (
    ACTIVATIONS,
    DECODER_ONLY,
    Constants,
    head_dim,
    known_keys,
    kv_heads,
)
from converters.family import Family
from converters.rope import KEYS as ROPE_KEYS
from converters.rope import read_rope
from converters.rules import Row
from xlinfer.config import ModelConfig, MoE

SIZES = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings
    """.split()
)
# What LlamaConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 10_000.0
FIXED: Mapping[str, tuple[Any, ...]] = {**DECODER_ONLY, "rope_interleaved": (False,)}
# pretraining_tp only splits products that are summed again; the last two are never read.
HARMLESS = frozenset({"pretraining_tp", "max_sequence_length", "is_llama_config"})

PREFIX, LAYER = "model.", "model.layers.{layer}."
BLOCK = (
    Row("embed_VD", f"{PREFIX}embed_tokens.weight", "V D -> V D"),
    Row("layers.attn_norm.scale_D", f"{LAYER}input_layernorm.weight", "D -> D"),
    Row("layers.attn.q_D_NH", f"{LAYER}self_attn.q_proj.weight", "(N H) D -> D (N H)"),
    Row("layers.attn.k_D_KH", f"{LAYER}self_attn.k_proj.weight", "(K H) D -> D (K H)"),
    Row("layers.attn.v_D_KH", f"{LAYER}self_attn.v_proj.weight", "(K H) D -> D (K H)"),
    Row("layers.attn.o_NH_D", f"{LAYER}self_attn.o_proj.weight", "D (N H) -> (N H) D"),
    Row("layers.mlp_norm.scale_D", f"{LAYER}post_attention_layernorm.weight", "D -> D"),
    Row("norm.scale_D", f"{PREFIX}norm.weight", "D -> D"),
)
MLP = (
    Row("layers.mlp.gate_DF", f"{LAYER}mlp.gate_proj.weight", "F D -> D F"),
    Row("layers.mlp.up_DF", f"{LAYER}mlp.up_proj.weight", "F D -> D F"),
    Row("layers.mlp.down_FD", f"{LAYER}mlp.down_proj.weight", "D F -> F D"),
)
HEAD = (Row("head_DV", "lm_head.weight", "V D -> D V"),)
QKV_BIAS = (
    Row("layers.attn.q_bias_NH", f"{LAYER}self_attn.q_proj.bias", "(N H) -> N H"),
    Row("layers.attn.k_bias_KH", f"{LAYER}self_attn.k_proj.bias", "(K H) -> K H"),
    Row("layers.attn.v_bias_KH", f"{LAYER}self_attn.v_proj.bias", "(K H) -> K H"),
)
OUTPUT_BIAS = (Row("layers.attn.o_bias_D", f"{LAYER}self_attn.o_proj.bias", "D -> D"),)
MLP_BIAS = (
    Row("layers.mlp.gate_bias_F", f"{LAYER}mlp.gate_proj.bias", "F -> F"),
    Row("layers.mlp.up_bias_F", f"{LAYER}mlp.up_proj.bias", "F -> F"),
    Row("layers.mlp.down_bias_D", f"{LAYER}mlp.down_proj.bias", "D -> D"),
)
QK_NORM = (
    Row("layers.attn.q_norm.scale_D", f"{LAYER}self_attn.q_norm.weight", "H -> H"),
    Row("layers.attn.k_norm.scale_D", f"{LAYER}self_attn.k_norm.weight", "H -> H"),
)
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # derived; old files hold it
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}


def llama_rows(config: ModelConfig) -> tuple[Row, ...]:
    """The table for the parts that `config` has, but its experts."""
    return (
        *BLOCK,
        *(MLP if config.moe is None else ()),
        *(() if config.tie_word_embeddings else HEAD),
        *(QKV_BIAS if config.qkv_bias else ()),
        *(OUTPUT_BIAS if config.attention_output_bias else ()),
        *(MLP_BIAS if config.mlp_bias else ()),
        *(QK_NORM if config.qk_norm else ()),
    )


def llama_config(
    constants: Constants,
    *,
    model_type: str,
    absent_rope_theta: float,
    windows: tuple[int | None, ...],
    qkv_bias: bool,
    attention_output_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
    moe: MoE | None,
) -> ModelConfig:
    """What Llama-shaped families read alike; the rest each of them says."""
    heads, hidden = constants.integer("num_attention_heads"), constants.integer("hidden_size")
    trained = constants.integer("max_position_embeddings")
    rope, longest = read_rope(constants, trained, absent_rope_theta)
    return ModelConfig(
        model_type=model_type,
        vocab_size=constants.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=constants.integer("intermediate_size"),
        num_layers=constants.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads(constants, heads),
        head_dim=head_dim(constants, heads, hidden),
        hidden_act=constants.choice("hidden_act", ACTIVATIONS),
        norm_eps=constants.number("rms_norm_eps"),
        rope=rope,
        windows=windows,
        qkv_bias=qkv_bias,
        attention_output_bias=attention_output_bias,
        mlp_bias=mlp_bias,
        moe=moe,
        qk_norm=qk_norm,
        tie_word_embeddings=constants.flag("tie_word_embeddings"),
        max_position_embeddings=longest,
    )


def read_llama(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), FIXED, ABSENT)
    bias = constants.flag("attention_bias")
    return llama_config(
        constants,
        model_type="llama",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=(None,) * constants.integer("num_hidden_layers"),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=constants.flag("mlp_bias"),
        qk_norm=False,
        moe=None,
    )


LLAMA = Family(model_type="llama", read=read_llama, rows=llama_rows, ignored=IGNORED, copies=COPIES)
