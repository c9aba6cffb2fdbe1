"""FP8 weights (e4m3) as DeepSeek, Qwen, fbgemm and ModelOpt write them; ModelOpt's NVFP4 too.

fp8, by block   weight [N, K], weight_scale_inv [ceil(N/128), ceil(K/128)]: it multiplies, in
                spite of its name; float32, bfloat16, or powers of two (E8M0)
fp8, by tensor  weight_scale_inv [] or [1]; static: activation_scale
fbgemm_fp8      weight_scale [N, 1]
modelopt FP8    weight_scale [] and input_scale []
modelopt NVFP4  weight uint8 [N, K/2], weight_scale e4m3 [N, K/16], and weight_scale_2, which
                multiplies; input_scale
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from converters.errors import CheckpointError
from converters.formats.compressed_tensors import PlainCode, fp4_packing
from converters.formats.packing import (
    Code,
    Matrix,
    Packing,
    Part,
    Parts,
    check_finite,
    check_kind,
    check_known,
    check_patterns,
    check_powers,
    covers,
)
from xlinfer.forms import FP8_BLOCK, Form

FLOATS = ("float16", "bfloat16", "float32")
E4M3 = ("float8_e4m3fn",)
POWERS = ("float8_e8m0fnu", "uint8")
Kind = Literal["block", "tensor", "channel", "nvfp4"]


@dataclass(frozen=True, kw_only=True)
class Fp8:
    where: str
    name: str
    kind: Kind | None  # None: weights are floats, the KV cache alone is not
    static: bool
    scale: str  # the suffixes of the scales
    input_scale: str
    listed: tuple[str, ...]
    outside: frozenset[str] = frozenset()

    def packing(self, matrix: Matrix) -> Packing | None:
        module = matrix.module
        if self.kind is None or any(covers(pattern, module) for pattern in self.listed):
            return None
        N, K = matrix.two_axes(self.where, self.name)
        if self.kind == "nvfp4":
            return fp4_packing(
                f"{self.where}: {module}", N, K, nv=True, packed=".weight",
                global_scale=".weight_scale_2", input_scale=".input_scale", divides=False,
            )  # fmt: skip
        scales: dict[Kind, tuple[tuple[int, ...], ...]] = {
            "block": ((-(-N // FP8_BLOCK), -(-K // FP8_BLOCK)),),
            "tensor": ((), (1,)),
            "channel": ((N, 1), (N,)),
        }
        powers = POWERS if self.kind == "block" else ()
        parts = {
            "weight": Part(suffix=".weight", shapes=((N, K),), dtypes=E4M3),
            "scale": Part(suffix=self.scale, shapes=scales[self.kind], dtypes=(*FLOATS, *powers)),
        }
        if self.static:
            parts["input_scale"] = Part(suffix=self.input_scale, shapes=((), (1,)), dtypes=FLOATS)
        form = Form(
            dtype="float8_e4m3fn", scales=self.kind, activations="fp8", input_scale=self.static
        )
        return Packing(form=form, code=PlainCode(scales=self.kind), parts=parts)

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        kept = dict(parts)
        for name in parts.keys() - {"weight", "packed"}:
            if parts[name].dtype.name in POWERS:
                kept[name] = parts[name].view(np.uint8)
                check_powers(name, kept[name], where)
            else:
                check_finite(name, parts[name], where)
        if self.kind == "nvfp4":
            kept.pop("input_scale", None)  # its inputs are not rounded
        return code, kept


KNOWN = {
    "fp8": "activation_scheme fmt quant_method weight_block_size modules_to_not_convert dequantize "
    "scale_fmt ignored_layers weight_per_tensor kv_cache_scheme",
    "fbgemm_fp8": "quant_method activation_scale_ub modules_to_not_convert",
    "modelopt": "quant_method quant_algo kv_cache_quant_algo exclude_modules ignore producer "
    "config_groups kv_cache_scheme group_size quantization",
}


def read_fp8(where: str, values: Mapping[str, Any]) -> Fp8:
    """The scheme that a quantization_config of quant_method "fp8" describes."""
    check_known(where, "fp8", values, KNOWN["fp8"].split())
    names = ("modules_to_not_convert", "ignored_layers")  # the latter is vLLM's
    block = values.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    scheme = values.get("activation_scheme")
    if block not in (None, [FP8_BLOCK, FP8_BLOCK]):
        raise CheckpointError(
            f"{where}: 'weight_block_size' is {block}; xlinfer reads [128, 128] and null"
        )
    if values.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"{where}: 'fmt' is {values['fmt']!r}; xlinfer reads e4m3")
    if scheme not in ("dynamic", "static") or (block and scheme == "static"):
        raise CheckpointError(
            f"{where}: 'activation_scheme' is {scheme!r}; it must be 'dynamic', or without blocks "
            "'static'"
        )
    return Fp8(
        where=where, name="fp8", kind="block" if block else "tensor", static=scheme == "static",
        scale=".weight_scale_inv", input_scale=".activation_scale",
        listed=tuple(module for name in names for module in _listed(where, values, name)),
    )  # fmt: skip


def read_fbgemm_fp8(where: str, values: Mapping[str, Any]) -> Fp8:
    """The scheme that a quantization_config of quant_method "fbgemm_fp8" describes. Its
    activation_scale_ub only caps what an input's scale may be."""
    check_known(where, "fbgemm_fp8", values, KNOWN["fbgemm_fp8"].split())
    return Fp8(
        where=where, name="fbgemm_fp8", kind="channel", static=False, scale=".weight_scale",
        input_scale="", listed=_listed(where, values, "modules_to_not_convert"),
    )  # fmt: skip


def read_modelopt(where: str, values: Mapping[str, Any]) -> Fp8:
    """The scheme of NVIDIA's ModelOpt: quant_method "modelopt", or hf_quant_config.json."""
    check_kind(where, values, dict, "quantization")
    values = values.get("quantization") or values
    check_kind(where, values, str, "quant_algo")
    check_known(where, "modelopt", values, KNOWN["modelopt"].split())
    kinds: Mapping[Any, Kind] = {"FP8": "tensor", "NVFP4": "nvfp4"}
    algorithm = values.get("quant_algo")
    only_cache = algorithm is None and values.get("kv_cache_quant_algo") is not None
    if algorithm not in kinds and not only_cache:
        raise CheckpointError(
            f"{where}: 'quant_algo' is {algorithm!r}; xlinfer reads {', '.join(kinds)}"
        )
    name = "exclude_modules" if values.get("exclude_modules") is not None else "ignore"
    return Fp8(
        where=where, name="modelopt", kind=kinds.get(algorithm), static=algorithm == "FP8",
        scale=".weight_scale", input_scale=".input_scale",
        listed=_listed(where, values, name),
    )  # fmt: skip


def _listed(where: str, values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    return check_patterns(values.get(name), f"{where}: {name!r}")
