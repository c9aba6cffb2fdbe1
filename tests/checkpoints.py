"""Small checkpoints in Hugging Face's layout, written for one test each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from converters import Checkpoint, Step, open_checkpoint

GOLDENS = Path(__file__).parent / "data" / "goldens"
FAMILIES = (
    "bloom",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "falcon",
    "falcon-grouped",
    "falcon-grouped-one-norm",
    "falcon-rw",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt-bigcode",
    "gpt-bigcode-heads",
    "gpt-neox",
    "gpt-oss",
    "gpt2",
    "granite",
    "llama",
    "llama3-rope",
    "llama4",
    "mistral-window",
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "phi3-longrope",
    "qwen2",
    "qwen2-moe",
    "qwen3",
    "qwen3-moe",
    "smollm3",
    "stablelm",
    "stablelm-parallel",
    "starcoder2",
)
QUANTIZED_GOLDENS = Path(__file__).parent / "data" / "quantized"
# Folder -> the format, and the family of the model.
QUANTIZED = {
    "awq-gemm-g32-qwen2": ("awq", "qwen2"),
    "bnb-nf4-dq": ("bitsandbytes", "llama"),
    "ct-fp8-dynamic": ("compressed-tensors", "llama"),
    "ct-w4a16-sym-g32": ("compressed-tensors", "llama"),
    "ct-w8a8-int8-dynamic": ("compressed-tensors", "llama"),
    "fp8-block-qwen3": ("fp8", "qwen3"),
    "gptq-v1-asym-actorder-g32": ("gptq", "llama"),
    "gptq-v1-sym-g32": ("gptq", "llama"),
    "mxfp4-gpt-oss": ("mxfp4", "gpt_oss"),
    "gguf-q4_0": ("gguf", "llama"),
    "gguf-q4_k_m": ("gguf", "llama"),
    "gguf-q8_0": ("gguf", "llama"),
}


def quantized_golden(name: str) -> Path:
    return (GOLDENS if name.startswith("gguf") else QUANTIZED_GOLDENS) / name


# Read with text_only.
MULTIMODAL = ("gemma3-images", "llama4-images", "mistral3")
ENCODER_DECODERS = ("bart", "t5", "t5-relu", "t5-untied")
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
}


def config(model_type: Any = "llama", **changes: Any) -> dict[str, Any]:
    """A complete config.json; a change to `...` removes the key."""
    values = {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        **EXPERTS.get(model_type, {}),
        **changes,
    }
    return {key: value for key, value in values.items() if value is not ...}


def tensors(cfg: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by their published names, wide enough that each moves the logits."""
    D, F, V = cfg["hidden_size"], cfg["intermediate_size"], cfg["vocab_size"]
    N, K = cfg["num_attention_heads"], cfg["num_key_value_heads"]
    H = cfg["head_dim"]
    kind = cfg["model_type"]
    only_qkv_bias = kind in ("qwen2", "qwen2_moe")
    qkv_bias = only_qkv_bias or cfg.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(cfg["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, out, into in (("q", N * H, D), ("k", K * H, D), ("v", K * H, D), ("o", D, N * H)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (out, into)
            if qkv_bias and (name != "o" or not only_qkv_bias):
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (out,)
        if has_experts(cfg, layer):
            shapes |= experts(cfg, at)
        else:
            shapes |= mlp(f"{at}.mlp", D, F)
            if cfg.get("mlp_bias", False):
                for name, out in (("gate", F), ("up", F), ("down", D)):
                    shapes[f"{at}.mlp.{name}_proj.bias"] = (out,)
        if kind.startswith("qwen3"):
            shapes |= {f"{at}.self_attn.{name}_norm.weight": (H,) for name in "qk"}
        shapes[f"{at}.input_layernorm.weight"] = (D,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (D,)
    shapes["model.norm.weight"] = (D,)
    if not cfg["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(0, 0.4, shape) + ("norm" in name)).astype(dtype)
        for name, shape in shapes.items()
    }


def has_experts(cfg: dict[str, Any], layer: int) -> bool:
    sparse = layer not in cfg.get("mlp_only_layers", ())
    return (
        cfg["model_type"] in EXPERTS
        and sparse
        and (layer + 1) % cfg.get("decoder_sparse_step", 1) == 0
    )


def mlp(
    at: str, D: int, F: int, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}.{gate}.weight": (F, D),
        f"{at}.{up}.weight": (F, D),
        f"{at}.{down}.weight": (D, F),
    }


def experts(cfg: dict[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's router and experts."""
    D, kind = cfg["hidden_size"], cfg["model_type"]
    E = cfg.get("num_experts") or cfg["num_local_experts"]
    block = f"{at}.block_sparse_moe" if kind == "mixtral" else f"{at}.mlp"
    names = ("w1", "w3", "w2") if kind == "mixtral" else ()
    size = cfg["intermediate_size"] if kind == "mixtral" else cfg["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (E, D)}
    for expert in range(E):
        shapes |= mlp(f"{block}.experts.{expert}", D, size, *names)
    if kind == "qwen2_moe":
        shapes |= mlp(f"{block}.shared_expert", D, cfg["shared_expert_intermediate_size"])
        shapes[f"{block}.shared_expert_gate.weight"] = (1, D)
    return shapes


def write(
    folder: Path, cfg: dict[str, Any], held: dict[str, np.ndarray], shards: int = 1, **files: Any
) -> Path:
    """The checkpoint in `folder`; `files` are more JSON files, by name without ending."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config": cfg, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    if shards == 1:
        save_file(held, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    placed = {tensor: names[i % shards] for i, tensor in enumerate(held)}
    for name in names:
        save_file({t: a for t, a in held.items() if placed[t] == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def float_steps(checkpoint: Checkpoint) -> list[Step]:
    """Its tensors with their places; all of them must be floats."""
    steps = [step for step in checkpoint.schedule() if isinstance(step, Step)]
    assert len(steps) == len(checkpoint.schedule())
    return steps


def opened(folder: Path, cfg: Any, **files: Any) -> Checkpoint:
    """`open_checkpoint` of a folder with that config.json and more JSON files, and no weights."""
    for name, content in {"config": cfg, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return open_checkpoint(folder)


def llama_logits(
    cfg: dict[str, Any],
    held: dict[str, np.ndarray],
    tokens_T: np.ndarray,
    freq_h: np.ndarray,
    scale: float = 1.0,
    windows: tuple[int | None, ...] | None = None,
) -> np.ndarray:
    """Float64 logits [T, V] of a Llama-shaped checkpoint, straight from its tensors.

    Written from the published formulas, one head and one layer at a time. `freq_h`: radians per
    position of each rotated pair; `scale`: of cos and sin.
    """
    w = {name: array.astype(np.float64) for name, array in held.items()}
    T, H, N = len(tokens_T), cfg["head_dim"], cfg["num_attention_heads"]
    group = N // cfg["num_key_value_heads"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x, name):
        mean = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean + cfg["rms_norm_eps"]) * w[f"{name}.weight"]

    def turn(x_TH):
        angle_Th = np.arange(T)[:, None] * freq_h
        pairs_Th = (x_TH[:, : H // 2] + 1j * x_TH[:, H // 2 :]) * np.exp(1j * angle_Th) * scale
        return np.concatenate([pairs_Th.real, pairs_Th.imag], axis=-1)

    x_TD = w["model.embed_tokens.weight"][tokens_T]
    behind = np.subtract.outer(np.arange(T), np.arange(T))
    for layer in range(cfg["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        window = windows[layer] if windows else None
        hidden = (behind < 0) | (behind >= (window or T))
        y_TD = norm(x_TD, f"{at}.input_layernorm")
        q, k, v = (linear(y_TD, f"{at}.self_attn.{n}_proj").reshape(T, -1, H) for n in "qkv")
        heads = []
        for head in range(N):
            q_TH, k_TH = q[:, head], k[:, head // group]
            if f"{at}.self_attn.q_norm.weight" in w:
                q_TH = norm(q_TH, f"{at}.self_attn.q_norm")
                k_TH = norm(k_TH, f"{at}.self_attn.k_norm")
            score = turn(q_TH) @ turn(k_TH).T / np.sqrt(H)
            score = np.exp(np.where(hidden, -np.inf, score - score.max(-1, keepdims=True)))
            heads.append(score / score.sum(-1, keepdims=True) @ v[:, head // group])
        x_TD = x_TD + linear(np.concatenate(heads, -1), f"{at}.self_attn.o_proj")
        y_TD = norm(x_TD, f"{at}.post_attention_layernorm")
        if has_experts(cfg, layer):
            x_TD = x_TD + mixed(cfg, w, at, y_TD)
            continue
        gate = linear(y_TD, f"{at}.mlp.gate_proj")
        x_TD = x_TD + linear(
            gate / (1 + np.exp(-gate)) * linear(y_TD, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj"
        )
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x_TD, "model.norm") @ head.T


def mixed(cfg: dict[str, Any], w: dict[str, np.ndarray], at: str, x_TD: np.ndarray) -> np.ndarray:
    """What a layer's experts add, one token and one expert at a time."""
    mixtral = cfg["model_type"] == "mixtral"
    block = f"{at}.block_sparse_moe" if mixtral else f"{at}.mlp"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")

    def expert(name, x_D):
        gate, up, down = (w[f"{block}.{name}.{n}.weight"] for n in names)
        return down @ (gate @ x_D / (1 + np.exp(-(gate @ x_D))) * (up @ x_D))

    y_TD = np.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        score = np.exp(w[f"{block}.gate.weight"] @ x_D)
        score /= score.sum()
        chosen = np.argsort(-score)[: cfg["num_experts_per_tok"]]
        divisor = score[chosen].sum() if mixtral or cfg.get("norm_topk_prob", False) else 1.0
        for e in chosen:
            y_TD[t] += score[e] / divisor * expert(f"experts.{e}", x_D)
        if cfg["model_type"] == "qwen2_moe":
            gate = w[f"{block}.shared_expert_gate.weight"][0] @ x_D
            y_TD[t] += expert("shared_expert", x_D) / (1 + np.exp(-gate))
    return y_TD
