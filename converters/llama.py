"""Llama 1, 2, 3.x and everything published as model_type "llama"; the table the others share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from converters.config import (
    ACTIVATIONS,
    DECODER_ONLY,
    Constants,
    head_dim,
    known_keys,
    kv_heads,
)
from converters.errors import CheckpointError
from converters.family import Family
from converters.kv_scales import kv_scale_rows
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

LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Linear:
    """A linear layer's tensors, `name` and ".weight" or ".bias": [outputs, inputs] and [outputs].
    `outputs` is that axis as rules.py writes axes, where it holds more than is meant."""

    name: str
    outputs: str | None = None
    piece: int = 0
    inputs_first: bool = False  # [inputs, outputs], as GPT-2 has it


class Matrix(NamedTuple):
    weight: str
    bias: str
    outputs: str
    inputs: str


# The linear layers of the Transformer; each of a family's has its name in the checkpoint.
MATRICES: Mapping[str, Matrix] = {
    "q": Matrix("layers.attn.q_D_NH", "layers.attn.q_bias_NH", "(N H)", "D"),
    "k": Matrix("layers.attn.k_D_KH", "layers.attn.k_bias_KH", "(K H)", "D"),
    "v": Matrix("layers.attn.v_D_KH", "layers.attn.v_bias_KH", "(K H)", "D"),
    "o": Matrix("layers.attn.o_NH_D", "layers.attn.o_bias_D", "D", "(N H)"),
    "gate": Matrix("layers.mlp.gate_DF", "layers.mlp.gate_bias_F", "F", "D"),
    "up": Matrix("layers.mlp.up_DF", "layers.mlp.up_bias_F", "F", "D"),
    "down": Matrix("layers.mlp.down_FD", "layers.mlp.down_bias_D", "D", "F"),
    "head": Matrix("head_DV", "head_bias_V", "V", "D"),
}
# What the checkpoint calls each part: norms and matrices without ".weight".
NAMES: Mapping[str, str | Linear] = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attn_norm": f"{LAYER}input_layernorm",
    "mlp_norm": f"{LAYER}post_attention_layernorm",
    "q": f"{LAYER}self_attn.q_proj",
    "k": f"{LAYER}self_attn.k_proj",
    "v": f"{LAYER}self_attn.v_proj",
    "o": f"{LAYER}self_attn.o_proj",
    "q_norm": f"{LAYER}self_attn.q_norm",
    "k_norm": f"{LAYER}self_attn.k_norm",
    "gate": f"{LAYER}mlp.gate_proj",
    "up": f"{LAYER}mlp.up_proj",
    "down": f"{LAYER}mlp.down_proj",
}
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # derived; old files hold it
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}


def llama_rows(config: ModelConfig, names: Mapping[str, str | Linear] = NAMES) -> tuple[Row, ...]:
    """The table for the parts that `config` has, but its experts and latent attention."""
    return (
        Row("embed_VD", f"{names['embed']}.weight", "V D -> V D", inputs="D"),
        *(_positions(names["positions"]) if config.learned_positions else ()),
        *(_norm(config, "embed_norm", names["embed_norm"]) if config.embedding_norm else ()),
        *_norm(config, "norm", names["norm"]),
        *(row for norm in _norms(config) for row in _norm(config, f"layers.{norm}", names[norm])),
        *(_qk_norms(config, names) if config.qk_norm in ("head", "all") else ()),
        *((Row("layers.attn.sinks_N", str(names["sinks"]), "N -> N"),) if config.sinks else ()),
        *(kv_scale_rows(*(_linear(names[part]).name for part in "kv")) if config.kv_scales else ()),
        *(row for part in _matrices(config) for row in _matrix(config, part, names[part])),
    )


def _linear(source: str | Linear) -> Linear:
    return Linear(source) if isinstance(source, str) else source


def _positions(source: str | Linear) -> tuple[Row, ...]:
    source = _linear(source)
    axes = f"{source.outputs or 'M'} D -> M D"
    return (Row("positions_MD", f"{source.name}.weight", axes, piece=source.piece),)


def _norms(config: ModelConfig) -> tuple[str, ...]:
    """Those of a layer that the config has, by their names in the Block."""
    before = ("attn_norm",) if config.shared_norm else ("attn_norm", "mlp_norm")
    after = ("attn_post_norm", "mlp_post_norm")
    return (*(before if config.pre_norm else ()), *(after if config.post_norm else ()))


def _norm(config: ModelConfig, target: str, source: str | Linear) -> tuple[Row, ...]:
    scale = Row(f"{target}.scale_D", f"{source}.weight", "D -> D")
    bias = Row(f"{target}.bias_D", f"{source}.bias", "D -> D")
    return (scale, bias) if config.norm == "layer" else (scale,)


def _qk_norms(config: ModelConfig, names: Mapping[str, str | Linear]) -> tuple[Row, ...]:
    q, k = ("(N H)", "(K H)") if config.qk_norm == "all" else ("H", "H")
    return (
        Row("layers.attn.q_norm.scale_D", f"{names['q_norm']}.weight", f"{q} -> {q}"),
        Row("layers.attn.k_norm.scale_D", f"{names['k_norm']}.weight", f"{k} -> {k}"),
    )


def _matrices(config: ModelConfig) -> tuple[str, ...]:
    mlp = ("gate", "up", "down") if config.gated_mlp else ("up", "down")
    return (
        *(("q", "k", "v", "o") if config.mla is None else ()),
        *mlp,
        *(() if config.tie_word_embeddings else ("head",)),
    )


def _matrix(config: ModelConfig, part: str, source: str | Linear) -> tuple[Row, ...]:
    source, to = _linear(source), MATRICES[part]
    outputs = source.outputs or to.outputs
    axes = f"{to.inputs} {outputs}" if source.inputs_first else f"{outputs} {to.inputs}"
    weight = Row(
        to.weight, f"{source.name}.weight", f"{axes} -> {to.inputs} {to.outputs}",
        piece=source.piece, inputs=to.inputs,
    )  # fmt: skip
    is_biased = {
        "o": config.attention_output_bias,
        "head": config.head_bias,
        **dict.fromkeys("qkv", config.qkv_bias),
        **dict.fromkeys(("gate", "up", "down"), config.mlp_bias),
    }
    if not is_biased[part]:
        return (weight,)
    bias_axes = f"{outputs} -> {to.outputs.strip('()')}"
    return weight, Row(to.bias, f"{source.name}.bias", bias_axes, piece=source.piece)


def llama_config(
    constants: Constants,
    *,
    model_type: str,
    absent_rope_theta: float | None,
    windows: tuple[int | None, ...] | None = None,
    qkv_bias: bool = False,
    attention_output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: Literal["head", "all", "after_rope"] | None = None,
    moe: MoE | None = None,
    rotary_factor: float = 1.0,
) -> ModelConfig:
    """What Llama-shaped families read alike, and Llama's own where they differ: of that, a family
    replaces what is not its. `absent_rope_theta` None: nothing is rotated; `windows` None: every
    layer sees all."""
    heads, hidden = constants.integer("num_attention_heads"), constants.integer("hidden_size")
    layers, longest = (
        constants.integer("num_hidden_layers"),
        constants.integer("max_position_embeddings"),
    )
    size, rope = head_dim(constants, heads, hidden), None
    rotary_dim = int(size * rotary_factor)
    if rotary_dim % 2 or not rotary_dim:
        raise CheckpointError(
            f"{constants.where}: partial_rotary_factor {rotary_factor:g} of a head_dim of {size} "
            "is no even number of dimensions; rotary embeddings turn pairs"
        )
    if absent_rope_theta is not None:
        rope, longest = read_rope(constants, longest, absent_rope_theta, rotary_dim)
    return ModelConfig(
        model_type=model_type,
        vocab_size=constants.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=constants.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads(constants, heads),
        head_dim=size,
        hidden_act=constants.choice("hidden_act", ACTIVATIONS),
        gated_mlp=True,
        norm="rms",
        norm_eps=constants.number("rms_norm_eps"),
        pre_norm=True,
        post_norm=False,
        parallel=False,
        shared_norm=False,
        ropes=(rope,) * layers,
        rotary_dim=rotary_dim,
        rope_interleaved=False,
        mla=None,
        alibi_scale=None,
        learned_positions=False,
        windows=windows or (None,) * layers,
        attention_chunk_sizes=(None,) * layers,
        attention_scale=size**-0.5,
        temperature_tuning=None,
        attention_softcap=None,
        sinks=False,
        qkv_bias=qkv_bias,
        attention_output_bias=attention_output_bias,
        mlp_bias=mlp_bias,
        moe=moe,
        encoder=None,
        qk_norm=qk_norm,
        embedding_norm=False,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_divisor=1.0,
        logit_softcap=None,
        head_bias=False,
        tie_word_embeddings=constants.flag("tie_word_embeddings"),
        max_position_embeddings=longest,
        weight_forms=(0,) * layers,
        kv_scales=False,
    )


def read_llama(constants: Constants) -> ModelConfig:
    constants = constants.check(known_keys(SIZES, ROPE_KEYS, HARMLESS), FIXED, ABSENT)
    bias = constants.flag("attention_bias")
    return llama_config(
        constants,
        model_type="llama",
        absent_rope_theta=ABSENT_ROPE_THETA,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=constants.flag("mlp_bias"),
    )


LLAMA = Family(model_type="llama", read=read_llama, rows=llama_rows, ignored=IGNORED, copies=COPIES)
