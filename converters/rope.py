"""The rotary part of config.json, in the style of transformers 4 or 5 -> one Rope."""

import math
from collections.abc import Mapping
from typing import Any

from converters.config import Constants
from converters.errors import CheckpointError
from xlinfer.config import (
    DefaultRope,
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    Rope,
    YarnRope,
)

# Per kind: what the format defines where the file is silent. Keys of REQUIRED have no default;
# None for `original_max_position_embeddings` stands for the model's max_position_embeddings, and
# None for `attention_factor` for the paper's formula.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
KINDS = {**{kind: kind for kind in REQUIRED}, "su": "longrope"}  # su: Phi-3's first files
ABSENT: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {},
    "dynamic": {"original_max_position_embeddings": None},
    "llama3": {},
    "yarn": {
        "original_max_position_embeddings": None,
        "attention_factor": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
    "longrope": {
        "original_max_position_embeddings": None,
        "factor": None,
        "attention_factor": None,
    },
}
KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
FIXED: Mapping[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0,)}


def read_rope(
    constants: Constants, max_position_embeddings: int, absent_theta: float, rotary_dim: int
) -> tuple[Rope, int]:
    """The kind of rotary embedding, and the longest context it is meant for; `rotary_dim`
    dimensions of a head are rotated.

    That context is `max_position_embeddings`, times the factor for the kinds whose files state
    the trained length there and leave the stretched one to the reader: vLLM's rule.
    `absent_theta` is the family's base where the file states none.
    """
    rope = _merged(constants, absent_theta)
    theta = rope.number("rope_theta")
    kind = rope.choice("rope_type", KINDS)
    names = ("rope_theta", "rope_type", *REQUIRED[kind])
    rope = rope.check(names, FIXED, ABSENT[kind])
    if kind == "default":
        return DefaultRope(theta=theta), max_position_embeddings
    if kind == "longrope":
        trained = _trained(rope, max_position_embeddings)
        return LongRope(
            theta=theta,
            short_factors=rope.numbers("short_factor", rotary_dim // 2),
            long_factors=rope.numbers("long_factor", rotary_dim // 2),
            original_max_position_embeddings=trained,
            attention_factor=_longrope_attention_factor(rope, max_position_embeddings, trained),
        ), max_position_embeddings
    factor = rope.number("factor")
    stretched = int(max_position_embeddings * factor)
    if kind == "linear":
        return LinearRope(theta=theta, factor=factor), stretched
    if kind == "dynamic":
        trained = _trained(rope, max_position_embeddings)
        if trained != max_position_embeddings:
            raise CheckpointError(
                f"{rope.where}: original_max_position_embeddings is {trained} and "
                f"max_position_embeddings {max_position_embeddings}; dynamic rope is defined on "
                "the latter, so they must agree"
            )
        return DynamicRope(
            theta=theta, factor=factor, original_max_position_embeddings=trained
        ), stretched
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low > high:
            raise CheckpointError(
                f"{rope.where}: low_freq_factor {low:g} must be at most high_freq_factor {high:g}"
            )
        return Llama3Rope(
            theta=theta,
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
        ), max_position_embeddings
    trained = _trained(rope, max_position_embeddings)
    yarn = YarnRope(
        theta=theta,
        factor=factor,
        original_max_position_embeddings=trained,
        beta_fast=rope.number("beta_fast"),
        beta_slow=rope.number("beta_slow"),
        attention_factor=_attention_factor(rope, factor),
        truncate=rope.flag("truncate"),
    )
    return yarn, max(max_position_embeddings, int(trained * factor))


def _merged(constants: Constants, absent_theta: float) -> Constants:
    """Both styles as one object with `rope_type` and `rope_theta`."""
    where = constants.where
    given = [n for n in ("rope_parameters", "rope_scaling") if constants.get(n) is not None]
    for name in given:
        if not isinstance(constants.get(name), dict):
            raise CheckpointError(f"{where}: {name!r} must be an object or null")
    if len(given) == 2:
        raise CheckpointError(
            f"{where}: it has both 'rope_parameters' and 'rope_scaling'; keep the one that is meant"
        )
    rope = dict(constants.get(given[0])) if given else {}
    kinds = {rope.pop(name) for name in ("rope_type", "type") if isinstance(rope.get(name), str)}
    if len(kinds) > 1:
        raise CheckpointError(f"{where}: rope_type and type disagree: {sorted(kinds)}")
    if not kinds and rope.keys() - {"rope_theta", "partial_rotary_factor"}:
        raise CheckpointError(f"{where}: {given[0]!r} must name its rope_type")
    rope["rope_type"] = kinds.pop() if kinds else "default"
    # Phi-3 has the trained length outside; of other kinds than longrope it says nothing.
    also = (
        ("original_max_position_embeddings",) if KINDS.get(rope["rope_type"]) == "longrope" else ()
    )
    for name in ("rope_theta", *also):
        outer = constants.get(name)
        if outer is not None and rope.setdefault(name, outer) != outer:
            raise CheckpointError(
                f"{where}: {name} is {outer} outside and {rope[name]} inside {given[0]!r}"
            )
    rope.setdefault("rope_theta", absent_theta)
    return Constants(f"{where}: {given[0]}" if given else where, rope)


def _trained(rope: Constants, max_position_embeddings: int) -> int:
    given = rope.optional_integer("original_max_position_embeddings")
    return max_position_embeddings if given is None else given


def _attention_factor(rope: Constants, factor: float) -> float:
    """The file's, or YaRN's 0.1 ln(factor) + 1, by the ratio of mscales where both are given."""
    if rope.values["attention_factor"] is not None:
        return rope.number("attention_factor")
    mscale, all_dim = rope.values["mscale"], rope.values["mscale_all_dim"]
    if not mscale or not all_dim:  # transformers reads 0 as absent
        return _mscale(factor, 1.0)
    return _mscale(factor, rope.number("mscale")) / _mscale(factor, rope.number("mscale_all_dim"))


def _longrope_attention_factor(rope: Constants, longest: int, trained: int) -> float:
    """The file's, or the paper's sqrt(1 + ln(factor) / ln(trained length))."""
    if (given := rope.optional_number("attention_factor")) is not None:
        return given
    factor = rope.optional_number("factor") or longest / trained
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0


def take_rotary_factor(constants: Constants, absent: float) -> tuple[Constants, float]:
    """The constants without `partial_rotary_factor`, outside and inside of either style, and what
    it is: the share of a head that is rotated; `absent` where the file is silent."""
    name, found = "partial_rotary_factor", {}
    for style in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := constants.get(style), dict) and name in rope:
            found[style] = Constants(f"{constants.where}: {style}", rope).number(name)
            constants = constants.having(
                **{style: {key: value for key, value in rope.items() if key != name}}
            )
    if constants.get(name) is not None:
        found[name] = constants.number(name)
    if len(factors := set(found.values())) > 1:
        raise CheckpointError(f"{constants.where}: {name} has two values: {found}")
    factor = factors.pop() if factors else absent
    if factor > 1:
        raise CheckpointError(
            f"{constants.where}: {constants.key(name)!r} is {factor:g}; it must be at most 1"
        )
    return constants.having(**{name: ...}), factor


def latent_scale(constants: Constants, absent_theta: float) -> float:
    """What DeepSeek's scores are multiplied by because of their rope: YaRN's mscale_all_dim, for q
    and for k, which cos and sin, being of a part of the head, leave out."""
    rope = _merged(constants, absent_theta)
    if not rope.values.get("mscale_all_dim"):
        return 1.0
    return _mscale(rope.number("factor"), rope.number("mscale_all_dim")) ** 2


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
