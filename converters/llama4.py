"""Llama 4's text models (Scout, Maverick), alone or without their vision: attention in chunks under
ropes of neighbours, full attention without a rope in every fourth layer, and experts of which one
is for every token."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters import moe
from converters.config import DECODER_ONLY, Constants, known_keys, layer_types
from converters.errors import CheckpointError
from converters.family import Family
from converters.llama import COPIES, IGNORED, LAYER, SIZES, llama_config, llama_rows
from converters.llama import NAMES as LLAMA_NAMES
from converters.rope import KEYS as ROPE_KEYS
from converters.rules import Row
from converters.smollm3 import has_rope
from xlinfer.config import ModelConfig, MoE, TemperatureTuning

# What Llama4TextConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "moe_layers": None,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "layer_types": None,
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "floor_scale": 8192,
    "tie_word_embeddings": False,
}
ABSENT_ROPE_THETA = 500_000.0
OWN_SIZES = frozenset({"intermediate_size_mlp"})
HARMLESS = moe.HARMLESS | {"for_llm_compressor"}  # how a tool was to see the experts
LAYER_TYPES = ("full_attention", "chunked_attention")
FEED_FORWARD = f"{LAYER}feed_forward"
NAMES = {
    **LLAMA_NAMES,
    **{part: f"{FEED_FORWARD}.{part}_proj" for part in ("gate", "up", "down")},
}
# Inputs come first; gate before up.
EXPERTS = (
    Row("layers.moe.router_DR", f"{FEED_FORWARD}.router.weight", "R D -> D R"),
    Row(
        "layers.moe.gate_up_EID", f"{FEED_FORWARD}.experts.gate_up_proj", "E D (P I) -> E (P I) D",
        inputs="D",
    ),
    Row("layers.moe.down_EDI", f"{FEED_FORWARD}.experts.down_proj", "E I D -> E D I", inputs="I"),
)  # fmt: skip
EXPERTS_APART = moe.expert_rows(
    "feed_forward", "gate_proj", "up_proj", "down_proj", router="router"
)
SHARED = moe.shared_rows("feed_forward.shared_expert")


def read_llama4(constants: Constants) -> ModelConfig:
    known = known_keys(SIZES, OWN_SIZES, ROPE_KEYS, moe.KEYS, HARMLESS)
    constants = constants.check(known, DECODER_ONLY, ABSENT)
    if constants.get("no_rope_layers") == []:  # so the first published files say it is derived
        constants = constants.having(no_rope_layers=None)
    roped, bias = has_rope(constants), constants.flag("attention_bias")
    config = llama_config(
        constants.having(intermediate_size=constants.integer("intermediate_size_mlp")),
        model_type="llama4_text",
        absent_rope_theta=ABSENT_ROPE_THETA,
        qkv_bias=bias,
        attention_output_bias=bias,
        qk_norm="after_rope" if constants.flag("use_qk_norm") else None,
        moe=_experts(constants),
    )
    ropes = zip(config.ropes, roped, strict=True)
    return replace(
        config,
        ropes=tuple(rope if is_used else None for rope, is_used in ropes),
        rope_interleaved=True,
        attention_chunk_sizes=_chunk_sizes(constants, roped),
        temperature_tuning=_temperature_tuning(constants),
    )


def _experts(constants: Constants) -> MoE | None:
    if not (layers := _sparse_layers(constants)):
        return None
    size = constants.integer("intermediate_size")
    experts = moe.read_moe(
        constants, size="intermediate_size", norm_topk_prob=False, shared=size, bias=False,
        layers=layers,
    )  # fmt: skip
    return replace(experts, scores="sigmoid", shared_gate=False, scaled_inputs=True)


def _sparse_layers(constants: Constants) -> tuple[int, ...]:
    """Those with experts: `moe_layers`, or where that is null every so many."""
    layers, held = constants.integer("num_hidden_layers"), constants.get("moe_layers")
    if held is None:
        step = constants.integer("interleave_moe_layer_step")
        return tuple(range(step - 1, layers, step))
    if not isinstance(held, list) or not all(
        type(layer) is int and 0 <= layer < layers for layer in held
    ):
        raise CheckpointError(
            f"{constants.where}: 'moe_layers' is {held!r}; it must be null or a list of layers, 0 "
            f"to {layers - 1}"
        )
    return tuple(sorted(set(held)))


def _chunk_sizes(constants: Constants, roped: tuple[bool, ...]) -> tuple[int | None, ...]:
    size = constants.optional_integer("attention_chunk_size")
    absent = [LAYER_TYPES[rope] for rope in roped]
    kinds = layer_types(constants, absent, LAYER_TYPES)
    if size is None and "chunked_attention" in kinds:
        raise CheckpointError(
            f"{constants.where}: 'attention_chunk_size' is null, but layers have chunked_attention"
        )
    return tuple(size if kind == "chunked_attention" else None for kind in kinds)


def _temperature_tuning(constants: Constants) -> TemperatureTuning | None:
    name = "attn_temperature_tuning"
    if type(constants.get(name)) is int:  # so in the first published files: 4 for true
        constants = constants.having(**{name: constants.integer(name, least=0) > 0})
    if not constants.flag(name):
        return None
    return TemperatureTuning(
        attn_scale=constants.number("attn_scale"), floor_scale=constants.number("floor_scale")
    )


def llama4_rows(config: ModelConfig, experts: tuple[Row, ...] = EXPERTS) -> tuple[Row, ...]:
    return (*llama_rows(config, NAMES), *((*experts, *SHARED) if config.moe is not None else ()))


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    read=read_llama4,
    rows=llama4_rows,
    rows_apart=partial(llama4_rows, experts=EXPERTS_APART),
    ignored=IGNORED,
    copies=COPIES,
)
