"""Matrices of small numbers in every quantized layout, packed bit by bit as its library's files are
described, beside the float32 matrix that they stand for: (number - zero) * scale.

K inputs   N outputs   G groups of inputs   E experts
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parents[1] / "data" / "quantized" / "bnb-nf4-dq" / "model.safetensors"
E4M3, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by exponent and mantissa
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
TWO_ROUNDINGS = 2.0**-22


@dataclass(frozen=True, kw_only=True)
class Packed:
    config: dict[str, Any]  # the quantization_config of a checkpoint of such matrices
    tensors: dict[str, np.ndarray]  # by what follows the module's name
    weight: np.ndarray  # float32 [N, K], of all experts [E, N, K]
    rtol: float = 0.0  # of a scale that is itself computed


Rng = np.random.Generator
Packer = Callable[[Rng, int, int], Packed]


def stream(q_RC: np.ndarray, bits: int) -> np.ndarray:
    """Each row's numbers one after the other, low bits first, int32 [R, ceil(C bits / 32)]."""
    bit = ((q_RC[..., None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(len(q_RC), -1)
    padded = np.pad(bit, ((0, 0), (0, -bit.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<i4")


def loose(q_RC: np.ndarray, bits: int) -> np.ndarray:
    """As many of each row's numbers in a word as are whole in it, int32."""
    per = 32 // bits
    words = np.pad(q_RC, ((0, 0), (0, -q_RC.shape[1] % per))).reshape(len(q_RC), -1, per)
    return (words << (bits * np.arange(per))).sum(-1).astype(np.uint32).view(np.int32)


def threes(q_RC: np.ndarray) -> np.ndarray:
    """32 numbers of 3 bits in 3 words, of which 10, 10 and 10 are whole in one."""
    q = q_RC.reshape(len(q_RC), -1, 32)
    run = lambda first, shift: (q[..., first : first + 10] << (3 * np.arange(10) + shift)).sum(-1)
    words = (
        run(0, 0) | (q[..., 10] & 3) << 30,
        q[..., 10] >> 2 | run(11, 1) | (q[..., 21] & 1) << 31,
        q[..., 21] >> 1 | run(22, 2),
    )
    return np.stack(words, -1).reshape(len(q_RC), -1).astype(np.uint32).view(np.int32)


def nibbles(q: np.ndarray) -> np.ndarray:
    """Two numbers in a byte, the low half first."""
    return (q[..., ::2] | q[..., 1::2] << 4).astype(np.uint8)


def halves(rng: Rng, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    return rng.uniform(0.002, 0.03, shape).astype(dtype)


def wide(per_group: np.ndarray, group: int) -> np.ndarray:
    """[N, G] for each input, float32 [N, K]."""
    return np.repeat(per_group.astype(np.float32), group, 1)


def groups_of(K: int, group: int, reordered: bool) -> np.ndarray:
    """A g_idx; matrices with the same inputs share it, as these decide it."""
    in_order = np.arange(K) // group
    return np.random.default_rng(K).permutation(in_order) if reordered else in_order


# What GPTQModel's converter subtracts from packed zeros; of 3 bits word after word.
V1 = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}


def gptq(
    rng: Rng, N: int, K: int, *, bits: int, group: int, symmetric: bool = False,
    version: str = "v2", reordered: bool = False, by: str = "gptqmodel", scales: Any = np.float16,
) -> Packed:  # fmt: skip
    """`by`: whose v1; AutoGPTQ packs zeros less one, which takes that none is 0."""
    groups, pack = K // group, threes if bits == 3 else lambda q: stream(q, bits)
    q_KN = rng.integers(0, 1 << bits, (K, N))
    zero_GN = rng.integers(by == "autogptq", 1 << bits, (groups, N))
    if symmetric:
        zero_GN[:] = 1 << (bits - 1)
    elif by == "gptqmodel":
        zero_GN[0, ::3] = 0  # each borrows from the number beside it
    of_K = groups_of(K, group, reordered)
    scale_GN = halves(rng, groups, N, dtype=scales)
    if version == "v2":
        qzeros = pack(zero_GN)
    elif by == "autogptq":
        qzeros = pack(zero_GN - 1)
    else:
        words = pack(zero_GN).view(np.uint32)
        less = np.resize(np.array(V1[bits], np.uint32), words.shape[1])
        qzeros = (words - less).view(np.int32)
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric,
        "desc_act": reordered, "checkpoint_format": "gptq" if version == "v1" else "gptq_v2",
        "lm_head": False, "pack_dtype": "int32", "true_sequential": True,
    }  # fmt: skip
    if by == "gptqmodel":
        config["meta"] = {"quantizer": ["gptqmodel:4.0.0"], "damp_percent": 0.05}
    return Packed(
        config=config,
        tensors={
            ".qweight": np.ascontiguousarray(pack(q_KN.T).T), ".qzeros": qzeros,
            ".scales": scale_GN, ".g_idx": of_K.astype(np.int32),
        },
        weight=(scale_GN.astype(np.float32)[of_K] * (q_KN - zero_GN[of_K]).astype(np.float32)).T,
    )  # fmt: skip


def awq(rng: Rng, N: int, K: int, *, group: int, version: str) -> Packed:
    groups = K // group
    q_NK, zero_NG = rng.integers(0, 16, (N, K)), rng.integers(0, 16, (N, groups))
    scale_NG = halves(rng, N, groups)
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True,
        "version": version, "modules_to_not_convert": None,
    }  # fmt: skip
    if version == "gemm":  # nibble i of column c is output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
        taken = [0, 2, 4, 6, 1, 3, 5, 7]
        turned = lambda q_RN: q_RN.reshape(len(q_RN), -1, 8)[..., taken].reshape(q_RN.shape)
        tensors = {
            ".qweight": stream(turned(q_NK.T), 4), ".qzeros": stream(turned(zero_NG.T), 4),
            ".scales": np.ascontiguousarray(scale_NG.T),
        }  # fmt: skip
    else:
        words = {32: 4, 64: 2}.get(group, 1)
        padding = ((0, 0), (0, -groups % (8 * words)))
        tensors = {
            ".qweight": stream(q_NK, 4), ".qzeros": stream(np.pad(zero_NG, padding), 4),
            ".scales": np.pad(scale_NG, padding),
        }  # fmt: skip
    weight = wide(scale_NG, group) * (q_NK - np.repeat(zero_NG, group, 1)).astype(np.float32)
    return Packed(config=config, tensors=tensors, weight=weight)


def compressed(format: str, weights: dict[str, Any], inputs: Any = None) -> dict[str, Any]:
    """compressed-tensors' quantization_config of one group."""
    of = {
        "targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": inputs
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": of},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
        "sparsity_config": {}, "transform_config": {}, "global_compression_ratio": None,
        "version": "0.20.0",
    }  # fmt: skip


def packed_ints(
    rng: Rng, N: int, K: int, *, bits: int, group: int | None, symmetric: bool = True,
    reordered: bool = False, pack: Callable[[np.ndarray, int], np.ndarray] = stream,
) -> Packed:  # fmt: skip
    """pack-quantized; `group` None: by channel."""
    size, half = group or K, 1 << (bits - 1)
    of_K = groups_of(K, size, reordered)
    q_NK = rng.integers(-half, half, (N, K))
    zero_NG = np.zeros((N, K // size), np.int64)
    scale_NG = halves(rng, N, K // size, dtype=BF16)
    tensors = {
        ".weight_packed": pack(q_NK + half, bits), ".weight_scale": scale_NG,
        ".weight_shape": np.array([N, K], np.int64),
    }  # fmt: skip
    if not symmetric:
        zero_NG = rng.integers(-half, half, (N, K // size))
        tensors[".weight_zero_point"] = np.ascontiguousarray(pack(zero_NG.T + half, bits).T)
    if reordered:
        tensors[".weight_g_idx"] = of_K.astype(np.int32)
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group,
        "strategy": "group" if group else "channel", "actorder": "group" if reordered else None,
    }  # fmt: skip
    weight = scale_NG.astype(np.float32)[:, of_K] * (q_NK - zero_NG[:, of_K]).astype(np.float32)
    return Packed(config=compressed("pack-quantized", weights), tensors=tensors, weight=weight)


def scales_of(
    rng: Rng, N: int, K: int, strategy: str, group: int | None, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """As stored, and for each number."""
    shape = {
        "tensor": (1,), "channel": (N, 1), "group": (N, K // (group or K)),
        "block": (-(-N // 128), -(-K // 128)),
    }[strategy]  # fmt: skip
    scale = halves(rng, *shape, dtype=dtype)
    full = scale.astype(np.float32).reshape(scale.shape if scale.ndim == 2 else (1, 1))
    high, across = (128, 128) if strategy == "block" else (N, -(-K // full.shape[1]))
    if strategy in ("channel", "group"):
        high = 1
    return scale, np.repeat(np.repeat(full, high, 0)[:N], across, 1)[:, :K]


def plain(
    rng: Rng, N: int, K: int, *, kind: str, strategy: str, group: int | None = None,
    inputs: Any = None, scales: Any = BF16,
) -> Packed:  # fmt: skip
    """int-quantized and float-quantized."""
    if kind == "int":
        q_NK = rng.integers(-128, 128, (N, K)).astype(np.int8)
    else:
        q_NK = rng.normal(0, 20, (N, K)).astype(E4M3)
    stored, scale_NK = scales_of(rng, N, K, strategy, group, scales)
    weights = {
        "num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "group_size": group,
        "block_structure": [128, 128] if strategy == "block" else None,
    }  # fmt: skip
    tensors = {".weight": q_NK, ".weight_scale": stored}
    if inputs is not None and not inputs["dynamic"]:
        tensors[".input_scale"] = halves(rng, 1, dtype=scales)
    return Packed(
        config=compressed(f"{kind}-quantized", weights, inputs), tensors=tensors,
        weight=q_NK.astype(np.float32) * scale_NK,
    )  # fmt: skip


def of_e2m1(code: np.ndarray) -> np.ndarray:
    return E2M1[code & 7] * np.where(code & 8, np.float32(-1), np.float32(1))


def nvfp4(rng: Rng, N: int, K: int, *, by: str) -> Packed:
    """`by` compressed-tensors, whose global scale divides, or modelopt, whose multiplies."""
    code, scale = rng.integers(0, 16, (N, K)), rng.uniform(1, 400, (N, K // 16)).astype(E4M3)
    over_all, inputs = np.float32(rng.uniform(500, 2000)), np.float32(rng.uniform(1, 9))
    weight = of_e2m1(code) * (wide(scale, 16) / over_all)
    if by == "modelopt":
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}
        tensors = {
            ".weight": nibbles(code), ".weight_scale": scale,
            ".weight_scale_2": np.array(1 / over_all, np.float32), ".input_scale": np.array(inputs),
        }  # fmt: skip
    else:
        kind = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16}
        config = compressed(
            "nvfp4-pack-quantized", {**kind, "strategy": "tensor_group"},
            {**kind, "strategy": "tensor_group", "dynamic": "local"},
        )  # fmt: skip
        tensors = {
            ".weight_packed": nibbles(code), ".weight_scale": scale,
            ".weight_global_scale": np.array([over_all]), ".input_global_scale": np.array([inputs]),
        }  # fmt: skip
    return Packed(config=config, tensors=tensors, weight=weight, rtol=TWO_ROUNDINGS)


def powers(rng: Rng, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """E8M0 as bytes, and the powers of two that they stand for."""
    exponent = rng.integers(97, 147, shape).astype(np.uint8)
    return exponent, np.ldexp(np.float32(1), exponent.astype(np.int32) - 127).astype(np.float32)


def mxfp4(rng: Rng, N: int, K: int) -> Packed:
    code, (stored, scale) = rng.integers(0, 16, (N, K)), powers(rng, N, K // 32)
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 32}
    return Packed(
        config=compressed("mxfp4-pack-quantized", {**weights, "strategy": "group"}),
        tensors={".weight_packed": nibbles(code), ".weight_scale": stored},
        weight=of_e2m1(code) * wide(scale, 32),
    )


def mxfp4_experts(rng: Rng, N: int, K: int, *, E: int = 2) -> Packed:
    code, (stored, scale) = rng.integers(0, 16, (E, N, K)), powers(rng, E, N, K // 32)
    return Packed(
        config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        tensors={"_blocks": nibbles(code).reshape(E, N, K // 32, 16), "_scales": stored},
        weight=of_e2m1(code) * np.repeat(scale, 32, 2),
    )


def fp8_blocks(rng: Rng, N: int, K: int, *, scales: Any = np.float32) -> Packed:
    """DeepSeek's and Qwen's; `scales` "e8m0" and "uint8" are powers of two."""
    q_NK = rng.normal(0, 20, (N, K)).astype(E4M3)
    if scales in ("e8m0", "uint8"):
        stored, scale = powers(rng, -(-N // 128), -(-K // 128))
        stored = stored.view(ml_dtypes.float8_e8m0fnu) if scales == "e8m0" else stored
    else:
        stored = scale = halves(rng, -(-N // 128), -(-K // 128), dtype=scales)
    full = np.repeat(np.repeat(scale.astype(np.float32), 128, 0)[:N], 128, 1)[:, :K]
    config = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    return Packed(
        config=config, tensors={".weight": q_NK, ".weight_scale_inv": stored},
        weight=q_NK.astype(np.float32) * full,
    )  # fmt: skip


def fp8_scaled(rng: Rng, N: int, K: int, *, by: str) -> Packed:
    """`by` fbgemm a scale for each output; transformers and modelopt one for all, and static."""
    q_NK = rng.normal(0, 20, (N, K)).astype(E4M3)
    scale = halves(rng, *((N, 1) if by == "fbgemm" else ()), dtype=np.float32)
    scale, inputs = np.asarray(scale), np.asarray(halves(rng, dtype=np.float32))
    config, tensors = {
        "fbgemm": (
            {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
            {".weight_scale": scale},
        ),
        "modelopt": (
            {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": []},
            {".weight_scale": scale, ".input_scale": inputs},
        ),
        "transformers": (
            {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
            {".weight_scale_inv": scale, ".activation_scale": inputs},
        ),
    }[by]
    weight = q_NK.astype(np.float32) * scale
    return Packed(config=config, tensors={".weight": q_NK, **tensors}, weight=weight)


def nf4_map() -> np.ndarray:
    """As bitsandbytes wrote it into a checkpoint."""
    return load_file(GOLDEN)["model.layers.0.mlp.down_proj.weight.quant_map"]


def bnb4(
    rng: Rng, N: int, K: int, *, grid: str, nested: bool = False, storage: str = "uint8"
) -> Packed:
    """bitsandbytes' 4 bits: blocks of 64 of all rows behind each other, the high half first."""
    table = nf4_map() if grid == "nf4" else np.concatenate([FP4, -FP4])
    code, blocks = rng.integers(0, 16, N * K), -(-N * K // 64)
    bytes_ = (code[::2] << 4 | code[1::2]).astype(np.uint8)
    state = {
        "quant_type": grid, "blocksize": 64, "dtype": "bfloat16", "shape": [N, K],
    }  # fmt: skip
    tensors = {
        ".weight": bytes_.view(BF16 if storage == "bfloat16" else np.uint8)[:, None],
        ".weight.quant_map": table,
    }
    if nested:
        absmax = rng.integers(0, 256, blocks).astype(np.uint8)
        map_ = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        over = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.025}
        scale = map_[absmax] * np.repeat(over, 256)[:blocks] + np.float32(0.025)
        tensors |= {".weight.nested_absmax": over, ".weight.nested_quant_map": map_}
    else:
        absmax = scale = rng.uniform(0.05, 0.3, blocks).astype(np.float32)
    tensors[".weight.absmax"] = absmax
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f".weight.quant_state.bitsandbytes__{grid}"] = raw
    config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_quant_type": grid,
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": storage,
        "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }  # fmt: skip
    weight = (table[code] * np.repeat(scale, 64)[: N * K]).reshape(N, K)
    # Its products and sums may be fused, and where they cancel, that shows.
    return Packed(config=config, tensors=tensors, weight=weight, rtol=1e-5 if nested else 1e-7)


def bnb8(rng: Rng, N: int, K: int) -> Packed:
    q_NK = rng.integers(-127, 128, (N, K)).astype(np.int8)
    SCB = rng.uniform(0.1, 0.5, N).astype(np.float32)
    return Packed(
        config={"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        tensors={".weight": q_NK, ".SCB": SCB, ".weight_format": np.array(0, np.uint8)},
        weight=q_NK.astype(np.float32) * SCB[:, None] / np.float32(127), rtol=TWO_ROUNDINGS,
    )  # fmt: skip
