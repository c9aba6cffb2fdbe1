"""The metadata of a GGUF file -> the config.json of the same model, which its family then reads;
and what metadata says of generating.

Keys and defaults are llama.cpp's: where a file is silent, what llama.cpp computes is meant. A key
of the architecture that no table names is an error.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from converters import gguf_tensors
from converters.config import Constants, generation
from converters.errors import CheckpointError
from converters.formats.gguf import GGUF, GGUFTensor, read_gguf_tensor
from xlinfer.config import GenerationConfig

Config = dict[str, Any]

# What every architecture has, by the names of config.json.
SIZES: Mapping[str, str] = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
ROPE = frozenset(
    """
    rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.finetuned
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    """.split()
)
HEADS = frozenset({"attention.head_count_kv", "attention.key_length", "attention.value_length"})
KNOWN = ROPE | HEADS | {"vocab_size"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What an architecture's reader sees: its keys without their prefix, and all tensors."""

    keys: Constants
    tensors: Mapping[str, GGUFTensor]

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    def integer(self, key: str, absent: int) -> int:
        return absent if self.keys.get(key) is None else self.keys.integer(key)

    def number[T](self, key: str, absent: T) -> float | T:
        return absent if self.keys.get(key) is None else self.keys.number(key)

    @property
    def heads(self) -> int:
        return self.keys.integer("attention.head_count")

    @property
    def head_dim(self) -> int:
        sizes = [self.keys.get(f"attention.{of}_length") for of in ("key", "value")]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"{self.keys.where}: attention.key_length and attention.value_length differ; "
                "xlinfer computes only models whose keys and values are equally long"
            )
        return self.integer("attention.key_length", self.shared_dim)

    @property
    def shared_dim(self) -> int:
        """A head's where nothing is said: families that know no other must not be told it."""
        return self.keys.integer("embedding_length") // self.heads

    @property
    def biased(self) -> bool:
        return self.has("blk.0.attn_q.bias")


@dataclass(frozen=True)
class Architecture:
    model_type: str
    # Of its config.json, beside what all have.
    also: Callable[[Model], Config] = lambda model: {}
    keys: Mapping[str, str] = field(default_factory=dict)  # of config.json -> of the file
    eps: str = "rms_norm_eps"
    optional: frozenset[str] = frozenset()  # keys that `also` reads
    partial: bool = False  # a part of each head may be rotated


def _llama(model: Model) -> Config:
    if not model.keys.values.get("expert_count"):
        return _biases(model)
    count, used = (model.keys.integer(key) for key in EXPERT_COUNTS)
    return {"model_type": "mixtral", "num_local_experts": count, "num_experts_per_tok": used}


def _biases(model: Model) -> Config:
    return {"attention_bias": model.biased, "mlp_bias": model.has("blk.0.ffn_up.bias")}


def _gemma2(model: Model, layers: int, attention: float | None, final: float | None) -> Config:
    """The scale of the scores is not in the file: the models of so many `layers` (27B) have
    another than their head_dim's. `attention` and `final` are the soft caps."""
    is_large = model.keys.integer("block_count") == layers
    return {
        "sliding_window": model.keys.integer("attention.sliding_window"),
        "attn_logit_softcapping": model.number("attn_logit_softcapping", attention),
        "final_logit_softcapping": model.number("final_logit_softcapping", final),
        "query_pre_attn_scalar": model.shared_dim if is_large else model.head_dim,
    }


def _gemma3(model: Model) -> Config:
    return {
        **_gemma2(model, 62, None, None),
        "sliding_window_pattern": model.integer(PATTERN, 6),
        "rope_local_base_freq": model.number("rope.freq_base_swa", 10_000.0),
    }


def _stablelm(model: Model) -> Config:
    parallel = not model.has("blk.0.ffn_norm.weight")
    return {"use_qkv_bias": model.biased, "use_parallel_residual": parallel}


def _granite(model: Model) -> Config:
    return {
        "attention_multiplier": model.number("attention.scale", model.head_dim**-0.5),
        "embedding_multiplier": model.number("embedding_scale", 1.0),
        "residual_multiplier": model.number("residual_scale", 1.0),
        "logits_scaling": model.number("logit_scale", 1.0),
        **_biases(model),
    }


EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
SHARED_EXPERT = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
EXPERT_COUNTS = ("expert_count", "expert_used_count")
WINDOW = "attention.sliding_window"
GEMMA2 = frozenset({WINDOW, "attn_logit_softcapping", "final_logit_softcapping"})
PATTERN = "attention.sliding_window_pattern"
GEMMA3 = GEMMA2 | {PATTERN, "rope.freq_base_swa"}
SCALES = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama", _llama, optional=frozenset({*EXPERT_COUNTS, "tensor_data_layout"})
    ),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture(
        "qwen2_moe",
        lambda model: {"norm_topk_prob": False, "qkv_bias": model.biased},
        keys={**EXPERTS, **SHARED_EXPERT},
    ),
    "qwen3": Architecture("qwen3", lambda model: {"attention_bias": model.biased}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        lambda model: {"norm_topk_prob": True, "attention_bias": model.biased},
        keys=EXPERTS,
    ),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", lambda model: _gemma2(model, 46, 50.0, 30.0), optional=GEMMA2),
    "gemma3": Architecture("gemma3_text", _gemma3, optional=GEMMA3),
    "phi2": Architecture("phi", eps="layer_norm_eps", partial=True),
    "phi3": Architecture(
        "phi3",
        lambda model: {"sliding_window": model.keys.get(WINDOW) or None},  # 0: there is none
        optional=frozenset({WINDOW}),
        partial=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        lambda model: {"use_bias": model.biased, "sliding_window": None},
        eps="norm_epsilon",
    ),
    "stablelm": Architecture(
        "stablelm",
        _stablelm,
        eps="layer_norm_eps",
        optional=frozenset({"use_parallel_residual"}),  # the tensors say it
        partial=True,
    ),
    "granite": Architecture("granite", _granite, optional=SCALES),
    "olmo2": Architecture("olmo2", lambda model: {"attention_bias": model.biased}),
    "smollm3": Architecture(
        "smollm3", lambda model: {"no_rope_layer_interval": 4, **_biases(model)}
    ),
}


def read_model(file: GGUF) -> tuple[Config, Mapping[str, GGUFTensor]]:
    """The config.json that the metadata amounts to, and the tensors by the names of its family.

    Raises CheckpointError for an architecture or a key that is not known, one that is missing or
    of another kind, and for what cannot be undone.
    """
    kind = file.metadata.get("general.type", "model")
    name = str(file.metadata.get("general.architecture"))
    if kind != "model":
        raise CheckpointError(f"{file.path} holds no model: its general.type is {kind!r}")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: xlinfer does not read general.architecture {name!r} from GGUF; it reads "
            f"{', '.join(ARCHITECTURES)}"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix 'token_embd.weight'")
    arch = ARCHITECTURES[name]
    sizes = {**SIZES, **arch.keys}
    rms = "rms_" if arch.eps == "rms_norm_eps" else ""
    eps = f"attention.layer_norm_{rms}epsilon"
    model = Model(keys=_keys(file, name, {*sizes.values(), eps}), tensors=file.tensors)
    size = model.head_dim
    rotated = model.integer("rope.dimension_count", size)
    if rotated != size and not arch.partial:
        raise CheckpointError(
            f"{file.path}: rope.dimension_count is {rotated} where a head has {size}; of {name} "
            "xlinfer rotates all"
        )
    config: Config = {
        "model_type": arch.model_type,
        **{key: model.keys.integer(of) for key, of in sizes.items()},
        arch.eps: model.keys.number(eps),
        "vocab_size": embedding.shape[0],
        "num_key_value_heads": model.integer("attention.head_count_kv", model.heads),
        "head_dim": None if size == model.shared_dim else size,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": model.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(model),
        # Up by an ulp: families multiply it by the size and round down.
        **({"partial_rotary_factor": math.nextafter(rotated / size, 1)} if arch.partial else {}),
        **arch.also(model),
    }
    return config, gguf_tensors.rename(file, config)


def _keys(file: GGUF, name: str, required: set[str]) -> Constants:
    """The architecture's, without its name before them."""
    values = {
        key.removeprefix(f"{name}."): _of_all_layers(file, key, value)
        for key, value in file.metadata.items()
        if key.startswith(f"{name}.")
    }
    lacking = sorted(required - values.keys())
    if lacking:
        raise CheckpointError(
            f"{file.path}: its metadata lacks {name}.{f', {name}.'.join(lacking)}"
        )
    known = KNOWN | required | ARCHITECTURES[name].optional
    keys = Constants(f"{file.path}: {name}", values)
    return keys.check(known, {"attention.causal": (True,)}, {})


def _of_all_layers(file: GGUF, key: str, value: Any) -> Any:
    """What a list has for every layer alike; a float32 as the decimal that config.json had."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise CheckpointError(
                f"{file.path}: {key} differs by layer; xlinfer computes models whose layers are "
                "alike"
            )
        value = value[0]
    is_single = isinstance(value, float) and np.float32(value) == value
    return float(str(np.float32(value))) if is_single else value


def _rope_scaling(model: Model) -> Config | None:
    """As config.json of transformers 4 has it.

    Llama 3's stretched rope comes as the divisor of each frequency, `rope_freqs`. These are
    LongRoPE's factors, short and long alike, and are kept as they are: the constants that they
    were computed from can only be guessed, as a factor common to three of them cancels.
    """
    keys, where = model.keys, model.keys.where
    kind = keys.values.get("rope.scaling.type", "none")
    trained = keys.values.get("rope.scaling.original_context_length") or keys.get("context_length")
    names = ("rope_freqs", "rope_factors_short", "rope_factors_long")
    both, short, long = (_factors(model, f"{name}.weight") for name in names)
    attention_factor = keys.values.get("rope.scaling.attn_factor", 1.0)
    if both or short or long:
        if both and kind != "none":
            raise CheckpointError(f"{where}: it has rope_freqs and rope.scaling.type {kind!r}")
        return {
            "rope_type": "longrope",
            "short_factor": both or short,
            "long_factor": both or long,
            "original_max_position_embeddings": trained,
            "attention_factor": attention_factor,
        }
    if attention_factor != 1:
        raise CheckpointError(f"{where}: rope.scaling.attn_factor is {attention_factor}; only 1")
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
        case "yarn":
            return {
                "rope_type": "yarn",
                "factor": keys.number("rope.scaling.factor"),
                "original_max_position_embeddings": trained,
                "beta_fast": model.number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": model.number("rope.scaling.yarn_beta_slow", 1.0),
            }
    raise CheckpointError(f"{where}: rope.scaling.type is {kind!r}; xlinfer reads linear and yarn")


def _factors(model: Model, name: str) -> list[float] | None:
    if (info := model.tensors.get(name)) is None:
        return None
    if info.blocks is not None or len(info.shape) != 1:
        raise CheckpointError(f"{info.file}: tensor {name!r} must be a row of floats")
    return read_gguf_tensor(info).astype(float).tolist()


# Tokens that end an answer, by their published names: a file names two or three by id, and these
# end a turn whether it does or not.
ENDS = frozenset(
    """
    <|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> <|return|> <|call|>
    <end_of_turn> <EOT> <|end_of_sentence|>
    """.split()
)
SAMPLING = {"temperature": "temp", "repetition_penalty": "penalty_repeat"} | {
    name: name for name in ("top_k", "top_p", "min_p")
}
CONTROL = 3  # of tokenizer.ggml.token_type


def read_generation(file: GGUF) -> GenerationConfig:
    """Stop ids: those that the metadata names, and control tokens by ENDS."""
    of = lambda name: file.metadata.get(f"tokenizer.ggml.{name}")
    tokens, kinds = of("tokens") or [], of("token_type") or []
    ends = ENDS - {"<|end|>"} if "<|return|>" in tokens else ENDS  # gpt-oss's ends a part
    named = [of(f"{name}_token_id") for name in ("eos", "eot", "eom")]
    found = [id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
             if kind == CONTROL and token in ends]  # fmt: skip
    asked = {
        "eos_token_id": [id for id in [*named, *found] if id is not None],
        "bos_token_id": of("bos_token_id"),
        **{name: file.metadata.get(f"general.sampling.{key}") for name, key in SAMPLING.items()},
    }
    return generation(Constants(f"{file.path}: metadata", asked))
