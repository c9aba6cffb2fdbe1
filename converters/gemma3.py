"""Gemma 3, its text models (1B, and the others without their vision): Gemma 2 with q and k
normalized, a window in five layers of six, and another rope in those."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from converters import gemma, gemma2
from converters.config import Constants, every, known_keys, layer_types
from converters.errors import CheckpointError
from converters.family import Family
from converters.llama import COPIES, IGNORED, SIZES, llama_rows
from converters.rope import KEYS as ROPE_KEYS
from converters.rope import read_rope
from xlinfer.config import ModelConfig

# What Gemma3TextConfig of transformers puts where the file is silent.
ABSENT: Mapping[str, Any] = {
    **gemma2.ABSENT,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10_000.0,
}
ABSENT_ROPE_THETA = 1_000_000.0
# A copy that transformers 5 writes of sliding_window_pattern, beside layer_types.
HARMLESS = gemma.HARMLESS | {"_sliding_window_pattern"}


def read_ropes(constants: Constants) -> tuple[Constants, Constants]:
    """The constants with the rope of full and of sliding attention in place of both: transformers 5
    nests them by layer type, transformers 4 has the second one's base apart."""
    both = constants.get("rope_parameters")
    if both is None:
        local = constants.having(
            rope_theta=constants.number("rope_local_base_freq"), rope_scaling=...
        )
        return constants, local
    kinds = {"full_attention", "sliding_attention"}
    if not isinstance(both, dict) or both.keys() != kinds:
        raise CheckpointError(
            f"{constants.where}: 'rope_parameters' must be an object with full_attention and "
            "sliding_attention"
        )
    full, sliding = both["full_attention"], both["sliding_attention"]
    return constants.having(rope_parameters=full), constants.having(rope_parameters=sliding)


def read_gemma3(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), gemma.FIXED, ABSENT)
    layers = constants.integer("num_hidden_layers")
    kinds = layer_types(constants, every(constants.integer("sliding_window_pattern"), layers))
    full, sliding = read_ropes(constants)
    config = gemma2.gemma2_config(
        full, model_type="gemma3_text", absent_rope_theta=ABSENT_ROPE_THETA, kinds=kinds
    )
    trained = constants.integer("max_position_embeddings")
    local, _ = read_rope(sliding, trained, ABSENT["rope_local_base_freq"], config.rotary_dim)
    by_kind = {"full_attention": config.ropes[0], "sliding_attention": local}
    return replace(
        config,
        qk_norm="head",
        ropes=tuple(by_kind[kind] for kind in kinds),
        max_position_embeddings=trained,  # already the stretched one, unlike other families'
    )


GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    read=read_gemma3,
    rows=partial(llama_rows, names=gemma2.NAMES),
    ignored=IGNORED,
    copies=COPIES,
)
