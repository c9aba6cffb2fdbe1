"""config.json and generation_config.json -> ModelConfig's parts. No jax.

Both styles are read: transformers 4 (`rope_theta` and `rope_scaling`, `type`) and transformers 5
(`rope_parameters`, `rope_type`). A key that no table names is an error, not a default.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from converters.errors import CheckpointError, read_object
from xlinfer.config import Encoder, GenerationConfig

# What transformers writes into every config.json and no forward pass of inference reads.
BOOKKEEPING = frozenset(
    """
    _name_or_path _attn_implementation _attn_implementation_autoset attn_implementation
    architectures auto_map model_type transformers_version transformers.js_config
    dtype torch_dtype torchscript use_bfloat16 pruned_heads tf_legacy_loss
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    tokenizer_class prefix output_attentions output_hidden_states return_dict use_cache
    initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop
    unsloth_version unsloth_fixed
    """.split()
)
# Requests bring these; files of transformers 4 may hold its defaults for them.
GENERATION = frozenset(
    """
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
    """.split()
)
# Names in config.json -> ModelConfig.hidden_act.
ACTIVATIONS: Mapping[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
# Keys whose other values would change what the model computes.
DECODER_ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),  # a causal model is one either way
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "partial_rotary_factor": (1.0,),
}
ENCODER_DECODER: Mapping[str, tuple[Any, ...]] = {
    **DECODER_ONLY,
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
}
# The same for families of which some models rotate a part of each head.
PARTIAL_ROTARY = {key: fixed for key, fixed in DECODER_ONLY.items() if "rotary" not in key}

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Constants:
    """The keys of one JSON object, read by type. `where` begins every error; `aliases` says what
    the file calls a key that families share: tables and readers use the shared name."""

    where: str
    values: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """What the file calls it."""
        return self.aliases.get(name, name)

    def get(self, name: str) -> Any:
        """The value as the file has it; None where it is absent."""
        return self.values.get(self.key(name))

    def having(self, **values: Any) -> "Constants":
        """These constants with other values; `...` removes the key."""
        changed = {self.key(name): value for name, value in values.items()}
        kept = {name: v for name, v in {**self.values, **changed}.items() if v is not ...}
        return replace(self, values=kept)

    def _get(self, name: str, kinds: tuple[type, ...], right: str) -> Any:
        name = self.key(name)
        if name not in self.values:
            raise CheckpointError(f"{self.where}: {name!r} is missing; it must be {right}")
        value = self.values[name]
        if type(value) not in kinds:  # not isinstance: True is no number here
            raise CheckpointError(f"{self.where}: {name!r} is {value!r}; it must be {right}")
        return value

    def integer(self, name: str, least: int = 1) -> int:
        right = f"an integer >= {least}"
        value = self._get(name, (int, float), right)
        if value != value // 1 or value < least:  # NaN and inf differ from their floor
            raise self._wrong(name, right)
        return int(value)

    def optional_integer(self, name: str) -> int | None:
        """None where the file says null."""
        return None if self.values.get(self.key(name), ...) is None else self.integer(name)

    def number(self, name: str, least: float = 0.0) -> float:
        """A finite number above `least`."""
        right = f"a number > {least:g}"
        value = self._get(name, (int, float), right)
        if not math.isfinite(value) or value <= least:
            raise self._wrong(name, right)
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """None where the file says null."""
        return None if self.values.get(self.key(name), ...) is None else self.number(name)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """`count` finite numbers above 0."""
        right = f"a list of {count} numbers > 0"
        values = self._get(name, (list,), right)
        fits = lambda v: type(v) in (int, float) and math.isfinite(v) and v > 0
        if len(values) != count or not all(map(fits, values)):
            raise CheckpointError(f"{self.where}: {name!r} must be {right}; it has {len(values)}")
        return tuple(map(float, values))

    def _wrong(self, name: str, right: str) -> CheckpointError:
        key = self.key(name)
        return CheckpointError(f"{self.where}: {key!r} is {self.values[key]!r}; it must be {right}")

    def flag(self, name: str) -> bool:
        return self._get(name, (bool,), "true or false")

    def choice[T](self, name: str, options: Mapping[str, T]) -> T:
        value = self._get(name, (str,), f"one of {', '.join(options)}")
        if value not in options:
            name = self.key(name)
            raise CheckpointError(
                f"{self.where}: {name!r} is {value!r}, which xlinfer does not compute; it "
                f"computes {', '.join(options)}"
            )
        return options[value]

    def names(self, name: str) -> list[str] | None:
        """A list of strings, or None where the file says null."""
        values = self._get(name, (list, NoneType), "a list of strings or null")
        if values is not None and not all(isinstance(value, str) for value in values):
            raise CheckpointError(f"{self.where}: {name!r} must be a list of strings or null")
        return values

    def check(
        self, known: Iterable[str], fixed: Mapping[str, tuple[Any, ...]], absent: Mapping[str, Any]
    ) -> "Constants":
        """These constants with `absent` filled in.

        Raises CheckpointError for a key in none of `known`, `fixed` and `absent`, and for one
        of `fixed` with another value.
        """
        fixed = {self.key(name): allowed for name, allowed in fixed.items()}
        absent = {self.key(name): value for name, value in absent.items()}
        known = {self.key(name) for name in known}
        unknown = sorted(self.values.keys() - known - fixed.keys() - absent.keys())
        if unknown:
            raise CheckpointError(
                f"{self.where}: unknown model constant {', '.join(map(repr, unknown))}. xlinfer "
                "does not know whether it changes what the model computes, so it does not guess; "
                "remove it if it has no meaning for this model."
            )
        for name, allowed in fixed.items():
            value = self.values.get(name, allowed[0])
            if value not in allowed:
                raise CheckpointError(
                    f"{self.where}: {name!r} is {value!r}; xlinfer computes only "
                    + " or ".join(map(repr, allowed))
                )
        return replace(self, values={**absent, **self.values})


def read_generation(
    folder: Path, document: Mapping[str, Any], encoder: Encoder | None
) -> GenerationConfig:
    """Stop ids and sampling defaults of a checkpoint whose config.json is `document`:
    generation_config.json's, and config.json's stop ids too; and what a decoder behind an `encoder`
    begins with: its start, and the token that generation forces to come next, if one is named."""
    config = Constants(str(folder / "config.json"), document)
    path = folder / "generation_config.json"
    asked = Constants(str(path), read_object(path) if path.is_file() else {})
    found = generation(asked, config)
    if encoder is None:
        return found
    return replace(found, decoder_start_token_ids=_decoder_start(asked, config, encoder))


def generation(*files: Constants) -> GenerationConfig:
    """The stop ids are those of all `files` together, the rest is the first one's. Temperature,
    top_k, top_p and min_p only where it does not say `do_sample: false`.
    """
    asked = files[0]
    stops = dict.fromkeys(id for file in files for id in _token_ids(file, "eos_token_id"))
    first = [id for file in files for id in _token_ids(file, "bos_token_id")]
    sampled = Constants(
        asked.where, asked.values if asked.values.get("do_sample") is not False else {}
    )
    return GenerationConfig(
        eos_token_ids=tuple(stops),
        bos_token_id=first[0] if first else None,
        temperature=_setting(sampled, "temperature", 0.0, math.inf),
        top_k=_whole(sampled, "top_k", least=-1),
        top_p=_setting(sampled, "top_p", 0.0, 1.0),
        min_p=_setting(sampled, "min_p", 0.0, 1.0),
        repetition_penalty=_setting(asked, "repetition_penalty", 0.0, math.inf),
        max_new_tokens=_whole(asked, "max_new_tokens", least=1),
    )


def _decoder_start(asked: Constants, config: Constants, encoder: Encoder) -> tuple[int, ...]:
    start = [*_token_ids(asked, "decoder_start_token_id"), encoder.decoder_start_token_id]
    forced = [
        *_token_ids(asked, "forced_bos_token_id"),
        *_token_ids(config, "forced_bos_token_id"),
    ]
    return (start[0], *forced[:1])


def _token_ids(constants: Constants, name: str) -> list[int]:
    value = constants.values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(id) is int and id >= 0 for id in ids):
        raise CheckpointError(
            f"{constants.where}: {name!r} is {value!r}; it must be a token id, a list of them "
            "or null"
        )
    return ids


def _setting(constants: Constants, name: str, low: float, high: float) -> float | None:
    value = constants.values.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high or math.isinf(value):
        raise CheckpointError(
            f"{constants.where}: {name!r} is {value!r}; it must be a number from {low:g} to "
            f"{high:g}"
        )
    return float(value)


def _whole(constants: Constants, name: str, *, least: int) -> int | None:
    if constants.values.get(name) is None:
        return None
    return constants.integer(name, least)


def known_keys(*tables: Iterable[str]) -> frozenset[str]:
    """BOOKKEEPING, GENERATION and the family's own."""
    return frozenset().union(BOOKKEEPING, GENERATION, *tables)


def head_dim(constants: Constants, heads: int, hidden: int) -> int:
    """`head_dim`, or by the format's definition hidden_size / num_attention_heads where null."""
    given = constants.optional_integer("head_dim")
    if given is None and hidden % heads:
        raise CheckpointError(
            f"{constants.where}: hidden_size {hidden} is not a multiple of num_attention_heads "
            f"{heads}, and no head_dim is given"
        )
    size = hidden // heads if given is None else given
    if size % 2:
        raise CheckpointError(
            f"{constants.where}: a head_dim of {size} is odd; rotary embeddings turn pairs"
        )
    return size


def kv_heads(constants: Constants, heads: int) -> int:
    """`num_key_value_heads`, or num_attention_heads where null."""
    given = constants.optional_integer("num_key_value_heads")
    count = heads if given is None else given
    if heads % count:
        raise CheckpointError(
            f"{constants.where}: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {count}"
        )
    return count


def layer_types(
    constants: Constants, absent: Sequence[str], known: Sequence[str] = LAYER_TYPES
) -> Sequence[str]:
    """`layer_types`, one of `known` for each layer, or `absent` where null."""
    layers, kinds = constants.integer("num_hidden_layers"), constants.names("layer_types")
    if kinds is None:
        return absent
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise CheckpointError(
            f"{constants.where}: 'layer_types' must hold {layers} of {' or '.join(known)}; "
            f"it holds {len(kinds)}: {', '.join(sorted(set(kinds)))}"
        )
    return kinds


def every(n: int, layers: int) -> list[str]:
    """Sliding attention, but full attention in every nth layer."""
    return ["sliding_attention" if (i + 1) % n else "full_attention" for i in range(layers)]


def windows_of(
    constants: Constants, kinds: Sequence[str], window: int | None
) -> tuple[int | None, ...]:
    """Each layer's window. Raises CheckpointError where one slides and `window` is None."""
    if "sliding_attention" in kinds and window is None:
        raise CheckpointError(
            f"{constants.where}: 'layer_types' asks for sliding_attention, but use_sliding_window "
            "is false or sliding_window is null"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
