"""SmolLM3: Llama, of whose layers every fourth has no rope."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.config import DECODER_ONLY, Constants, known_keys, layer_types, windows_of
from converters.errors import CheckpointError
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_config, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from xlinfer.config import ModelConfig

# What SmolLM3Config of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}
ABSENT_ROPE_THETA = 2_000_000.0
HARMLESS = frozenset({"pretraining_tp", "max_window_layers"})  # never read


def has_rope(constants: Constants) -> tuple[bool, ...]:
    """Of each layer. `no_rope_layers` holds 1 where there is one, whatever its name says."""
    layers, held = constants.integer("num_hidden_layers"), constants.get("no_rope_layers")
    if held is None:
        every = constants.integer("no_rope_layer_interval")
        return tuple((layer + 1) % every != 0 for layer in range(layers))
    if not isinstance(held, list) or len(held) != layers or not set(held) <= {0, 1}:
        raise CheckpointError(
            f"{constants.where}: 'no_rope_layers' must be null or {layers} of 0 and 1: 1 where "
            "the layer has a rope"
        )
    return tuple(map(bool, held))


def read_smollm3(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), DECODER_ONLY, ABSENT)
    bias, roped = constants.flag("attention_bias"), has_rope(constants)
    used = constants.flag("use_sliding_window")
    window = constants.optional_integer("sliding_window") if used else None
    slides = lambda rope: window is not None and not rope
    absent = ["sliding_attention" if slides(rope) else "full_attention" for rope in roped]
    config = llama_config(
        constants,
        model_type="smollm3",
        absent_rope_theta=ABSENT_ROPE_THETA,
        windows=windows_of(constants, layer_types(constants, absent), window),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=constants.flag("mlp_bias"),
    )
    ropes = zip(config.ropes, roped, strict=True)
    return replace(config, ropes=tuple(rope if is_used else None for rope, is_used in ropes))


SMOLLM3 = Family(
    model_type="smollm3", read=read_smollm3, rows=llama_rows, ignored=IGNORED, copies=COPIES
)
