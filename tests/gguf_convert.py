"""A Hugging Face checkpoint of floats as GGUF, by what is known of llama.cpp's converter: names of
keys and tensors are the gguf package's, and no part of it is how xlinfer reads them."""

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

ARCHS = {"mistral": "llama", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
         "gemma3_text": "gemma3", "phi": "phi2"}  # fmt: skip
PERMUTED = ("llama", "granite", "smollm3")


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Halves of each head to neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def llama3_factors(rope: dict[str, Any], dim: int) -> np.ndarray:
    """The divisor of each frequency, by Llama 3's formula."""
    wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (turns - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return np.where(turns > high, 1, np.where(turns < low, rope["factor"], between)).astype("f4")


def write_keys(out: gguf.GGUFWriter, cfg: dict[str, Any], model_type: str) -> None:
    heads, hidden = cfg["num_attention_heads"], cfg["hidden_size"]
    size = cfg.get("head_dim") or hidden // heads
    out.add_context_length(cfg["max_position_embeddings"])
    out.add_embedding_length(hidden)
    out.add_block_count(cfg["num_hidden_layers"])
    out.add_feed_forward_length(cfg["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(cfg["num_key_value_heads"])
    if cfg.get("head_dim"):
        out.add_key_length(size)
        out.add_value_length(size)
    if "rms_norm_eps" in cfg:
        out.add_layer_norm_rms_eps(cfg["rms_norm_eps"])
    else:
        out.add_layer_norm_eps(cfg.get("layer_norm_eps") or cfg["norm_epsilon"])
    rope = cfg["rope_parameters"]
    rope = rope.get("full_attention", rope)
    out.add_rope_freq_base(rope["rope_theta"])
    out.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        out.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        out.add_rope_scaling_factor(rope["factor"])
    if (trained := rope.get("original_max_position_embeddings")) and rope["rope_type"] != "llama3":
        out.add_rope_scaling_orig_ctx_len(trained)
    if rope["rope_type"] == "longrope":
        ratio = cfg["max_position_embeddings"] / trained
        out.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(ratio) / np.log(trained))))
    if model_type in ("gemma2", "gemma3_text", "phi3"):
        out.add_sliding_window(cfg["sliding_window"] or 0)
    if cfg.get("attn_logit_softcapping"):
        out.add_attn_logit_softcapping(cfg["attn_logit_softcapping"])
    if cfg.get("final_logit_softcapping"):
        out.add_final_logit_softcapping(cfg["final_logit_softcapping"])
    if count := cfg.get("num_local_experts") or cfg.get("num_experts"):
        out.add_expert_count(count)
        out.add_expert_used_count(cfg["num_experts_per_tok"])
    if "moe_intermediate_size" in cfg:
        out.add_expert_feed_forward_length(cfg["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in cfg:
        out.add_expert_shared_feed_forward_length(cfg["shared_expert_intermediate_size"])
    if model_type == "granite":
        out.add_attention_scale(cfg["attention_multiplier"])
        out.add_embedding_scale(cfg["embedding_multiplier"])
        out.add_residual_scale(cfg["residual_multiplier"])
        out.add_logit_scale(cfg["logits_scaling"])


def changed(held: dict[str, np.ndarray], cfg: dict[str, Any], arch: str) -> dict[str, np.ndarray]:
    """Rows of q and k permuted, norms of Gemma as 1 + w, experts stacked, divisors of a rope."""
    made, experts = {}, {}
    for name, array in held.items():
        if ".experts." in name:
            block, _, of = name.partition(".experts.")
            number, part = of.split(".", 1)
            if arch == "llama":  # the stack's name in the package's table
                block = block.replace("model.", "").replace("block_sparse_moe", "feed_forward")
            experts.setdefault(f"{block}.experts.{part}", {})[int(number)] = array
            continue
        if arch in PERMUTED and ("q_proj" in name or "k_proj" in name):
            q = "q_proj" in name
            array = permuted(array, cfg["num_attention_heads" if q else "num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        made[name] = array.reshape(-1) if name.endswith("shared_expert_gate.weight") else array
    made |= {name: np.stack([of[e] for e in sorted(of)]) for name, of in experts.items()}
    rope = cfg["rope_parameters"]
    if rope.get("rope_type") == "llama3":
        made["rope_freqs.weight"] = llama3_factors(rope, cfg["head_dim"])
    if rope.get("rope_type") == "longrope":
        for of in ("long", "short"):
            made[f"rope_factors_{of}.weight"] = np.array(rope[f"{of}_factor"], np.float32)
    return made


def to_gguf(
    source: Path, path: Path, tokenizer: dict[str, Any] | None = None, dtype: Any = None
) -> Path:
    """The checkpoint in the folder `source` as the file `path`; matrices in `dtype`. `tokenizer`:
    what to write under tokenizer.ggml, by the names of GGUFWriter's methods."""
    cfg = json.loads((source / "config.json").read_text())
    model_type, held = cfg["model_type"], load_file(source / "model.safetensors")
    arch = str(ARCHS.get(model_type, model_type))
    out = gguf.GGUFWriter(path, arch)
    write_keys(out, cfg, model_type)
    for method, value in (tokenizer or {}).items():
        getattr(out, f"add_{method}")(value)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, cfg["num_hidden_layers"])
    for name, array in changed(held, cfg, arch).items():
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known or name.startswith("rope_"), name
        if array.ndim == 1:
            array = array.astype(np.float32)
        elif dtype is not None:
            array = array.astype(dtype)
        if array.dtype == ml_dtypes.bfloat16:  # which the package takes as bytes alone
            kind = gguf.GGMLQuantizationType.BF16
            out.add_tensor(known or name, array.view(np.uint8), raw_dtype=kind)
        else:
            out.add_tensor(known or name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def tokenizer_keys(folder: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """A byte-level BPE tokenizer.json, its special tokens and its chat template, for to_gguf."""
    document = json.loads((folder / "tokenizer.json").read_text())
    named = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = dict(document["model"]["vocab"])
    kinds = dict.fromkeys(vocabulary.values(), gguf.TokenType.NORMAL)
    for token in document["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        kinds[token["id"]] = (
            gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        )
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": [kinds[vocabulary[token]] for token in tokens],
        "token_merges": [" ".join(merge) for merge in document["model"]["merges"]],
        "bos_token_id": vocabulary[named["bos_token"]],
        "eos_token_id": vocabulary[named["eos_token"]],
        "add_bos_token": False,
        "chat_template": (folder / "chat_template.jinja").read_text(),
    }
