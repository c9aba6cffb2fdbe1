"""Falcon 1 and 2: LayerNorm, an MLP without a gate, q, k and v in one tensor by turns of groups.
7B has one kv head, 11B, 40B and 180B have a group for each kv head, and both have attention and MLP
side by side; the RW models have all heads, ALiBi, and one part after the other.

ALiBi is computed in float32, as its paper has it. transformers rounds slopes and biases to bf16,
and so gives other logits where a position times a slope has more than 8 bits: docs/LOG.md.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys
from converters.family import Family
from converters.llama import SIZES, Linear, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from converters.rules import Row
from xlinfer.config import ModelConfig

ALIASES = {
    "hidden_act": "activation",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "layer_norm_epsilon",
}
# What FalconConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "intermediate_size": None,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "bias": False,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "num_kv_heads": None,
    "tie_word_embeddings": True,
    "head_dim": None,
}
ABSENT_ROPE_THETA = 10_000.0
FIXED: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "apply_residual_connection_post_layernorm": (False,),
    # transformers reads neither.
    "num_key_value_heads": (None,),
    "head_dim": (None,),
}
HARMLESS = frozenset({"ff_factor"})  # of ffn_hidden_size to hidden_size; never read
# What can be asked of the new architecture, and of the old one.
NEW: Mapping[str, tuple[Any, ...]] = {
    "parallel_attn": (True,),
    "num_ln_in_parallel_attn": (2, None, 1),
}
OLD: Mapping[str, tuple[Any, ...]] = {
    "parallel_attn": (True, False),
    "num_ln_in_parallel_attn": (None, 1),
}
LAYER = "transformer.h.{layer}."
QKV = f"{LAYER}self_attention.query_key_value"
NAMES = {
    "embed": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attn_norm": f"{LAYER}input_layernorm",
    "mlp_norm": f"{LAYER}post_attention_layernorm",
    "q": Linear(QKV, "(X G|1|1 H)", 0),
    "k": Linear(QKV, "(K G|1|1 H)", 1),
    "v": Linear(QKV, "(K G|1|1 H)", 2),
    "o": f"{LAYER}self_attention.dense",
    "up": f"{LAYER}mlp.dense_h_to_4h",
    "down": f"{LAYER}mlp.dense_4h_to_h",
}
TWO_PARALLEL_NORMS = {"attn_norm": f"{LAYER}ln_attn", "mlp_norm": f"{LAYER}ln_mlp"}


def read_falcon(constants: Constants) -> ModelConfig:
    constants = replace(constants, aliases=ALIASES)
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS, NEW), FIXED, ABSENT)
    is_new = constants.flag("new_decoder_architecture")
    constants = constants.check(constants.values, NEW if is_new else OLD, {"parallel_attn": True})
    if constants.get("intermediate_size") is None:
        constants = constants.having(intermediate_size=4 * constants.integer("hidden_size"))
    bias, parallel = constants.flag("bias"), constants.flag("parallel_attn")
    config = llama_config(
        constants.having(num_key_value_heads=_kv_heads(constants, is_new)),
        model_type="falcon",
        absent_rope_theta=None if constants.flag("alibi") else ABSENT_ROPE_THETA,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
    )
    one_norm = constants.get("num_ln_in_parallel_attn") == 1 or not is_new
    return replace(
        config,
        norm="layer",
        gated_mlp=False,
        parallel=parallel,
        shared_norm=parallel and one_norm,
        # What is scaled is q·k and the bias together.
        alibi_scale=config.attention_scale if constants.flag("alibi") else None,
    )


def _kv_heads(constants: Constants, is_new: bool) -> int:
    """The old architecture has one or all, whatever num_kv_heads says."""
    heads, given = constants.integer("num_attention_heads"), constants.values["num_kv_heads"]
    if is_new:
        return heads if given is None else constants.integer("num_kv_heads")
    if constants.flag("multi_query"):
        return 1
    constants.check(constants.values, {"num_kv_heads": (None, heads)}, {})
    return heads


def falcon_rows(config: ModelConfig) -> tuple[Row, ...]:
    has_two = config.parallel and not config.shared_norm
    return llama_rows(config, {**NAMES, **TWO_PARALLEL_NORMS} if has_two else NAMES)


FALCON = Family(
    model_type="falcon",
    read=read_falcon,
    rows=falcon_rows,
    prefix="transformer.",
    ignored=(),
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
)
