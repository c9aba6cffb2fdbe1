"""The tensors of a GGUF file by the names of their family, with what convert_hf_to_gguf did to
them undone: as data, so that packed blocks are moved and never computed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from converters.errors import CheckpointError
from converters.formats.gguf import GGUF, GGUFTensor

MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Of a layer. "{expert}": the stack is taken apart.
LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
QWEN_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# By model_type, where it differs from the tables above.
NAMES: Mapping[str, Mapping[str, str]] = {
    "mixtral": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
    },
    "qwen2_moe": QWEN_EXPERTS,
    "qwen3_moe": QWEN_EXPERTS,
    "gemma2": POST_NORMS,
    "gemma3_text": POST_NORMS,
    "olmo2": POST_NORMS,
    "phi": {
        "output_norm": "model.final_layernorm",
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    },
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "starcoder2": {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
# Derived from the rope's constants, or read with them.
ROPE = re.compile(r"rope_freqs\.weight|rope_factors_(short|long)\.weight|.*\.attn_rot_embd\.weight")
OF_LAYER = re.compile(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?\.(weight|bias)")  # a number: old experts
OF_MODEL = re.compile(r"(\w+)\.(weight|bias)")
# Their ropes turn neighbours in llama.cpp, and halves of a head in Hugging Face's layout.
PAIRED = frozenset({"llama", "mixtral", "granite", "smollm3"})
GEMMAS = frozenset({"gemma", "gemma2", "gemma3_text"})  # norms are stored as 1 + w


def rename(file: GGUF, config: Mapping[str, Any]) -> dict[str, GGUFTensor]:
    """The tensors by the names of the family of `config`; what has none there keeps its own."""
    names = {**MODEL, **LAYER, **NAMES.get(config["model_type"], {})}
    renamed: dict[str, GGUFTensor] = {}
    for info in file.tensors.values():
        if ROPE.fullmatch(info.name):
            continue
        for one in _named(info, names):
            if one.name in renamed:
                raise CheckpointError(f"{file.path} has {one.name} twice, by two names")
            renamed[one.name] = _undone(info.name, one, config)
    return renamed


def _named(info: GGUFTensor, names: Mapping[str, str]) -> Iterator[GGUFTensor]:
    if (of := OF_LAYER.fullmatch(info.name)) is not None:
        layer, part, expert, kind = of.groups()
        name = names.get(part if expert is None else f"{part}_exps")
        if name is None:
            yield info
            return
        name = f"model.layers.{int(layer)}.{name}.{kind}"
        if expert is not None:
            yield replace(info, name=name.format(expert=int(expert)))
        elif "{expert}" in name:
            yield from _experts(info, name)
        else:
            yield replace(info, name=name)
        return
    of = OF_MODEL.fullmatch(info.name)
    name = names.get(of[1]) if of else None
    yield info if of is None or name is None else replace(info, name=f"{name}.{of[2]}")


def _experts(stack: GGUFTensor, name: str) -> Iterator[GGUFTensor]:
    """Each of a stack [E, N, K], which lie one after the other."""
    count, *shape = stack.shape
    for expert in range(count):
        offset = stack.offset + expert * (stack.nbytes // count)
        yield replace(stack, name=name.format(expert=expert), shape=tuple(shape), offset=offset)


def _undone(stored: str, info: GGUFTensor, config: Mapping[str, Any]) -> GGUFTensor:
    """`info`, that the file has as `stored`, with what is to be undone."""
    kind = config["model_type"]
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = stored.split(".")[-2:][0]
    if kind in PAIRED and part in heads:
        count = config[heads[part]]
        size = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
        if info.shape[0] != count * size:
            raise CheckpointError(
                f"{info.file}: tensor {stored!r} has {info.shape[0]} rows, not {count} heads of "
                f"{size}"
            )
        return replace(info, paired_heads=count)
    if kind in GEMMAS and stored.endswith("norm.weight"):
        if info.blocks is not None:
            raise CheckpointError(f"{info.file}: norm {stored!r} must be floats")
        return replace(info, added=1.0)
    if part == "ffn_gate_inp_shexp" and len(info.shape) == 1:
        return replace(info, shape=(1, *info.shape))
    return info
