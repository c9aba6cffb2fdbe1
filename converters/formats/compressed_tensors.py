"""compressed-tensors' layouts (llm-compressor): integers and floats of 4 and 8 bits.

    pack-quantized   weight_packed int32 [N, K/W]: number i of word c is input W c + i, plus 2^(b-1)
                     weight_zero_point int32 [N/W, G], packed along N the same way
                     weight_g_idx int32 [K]
                     For 3, 5, 6 and 7 bits, files until May 2026 have W = 32 // b and bits left
                     over, later ones one stream of bits; the width tells which
    int-quantized    weight int8 [N, K]
    float-quantized  weight e4m3 [N, K]
    nvfp4-pack       weight_packed uint8 [N, K/2], low nibble first; weight_scale e4m3 [N, K/16];
                     weight_global_scale float32 [1] divides; input_global_scale is for inputs
                     that are rounded too, which they are not here
    mxfp4-pack       the same with weight_scale uint8 [N, K/32], powers of two (E8M0)

weight_scale is [N, G] by group, [N, 1] by channel, [1] for all, [N/128, K/128] by block; w = scale
* q, or scale * (q - zero). input_scale [1] is there where activations are static.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from converters.errors import CheckpointError
from converters.formats.gptq import INDEX, order_of
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

SCALES = ("float16", "bfloat16", "float32")
FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
Strategy = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True, kw_only=True)
class PackedCode:
    bits: int
    shape: tuple[int, int]
    groups: int
    symmetric: bool
    permuted: bool


@dataclass(frozen=True, kw_only=True)
class PlainCode:
    """int8 or e4m3 numbers, as they are."""

    scales: Strategy


@dataclass(frozen=True, kw_only=True)
class Fp4Code:
    """e2m1 numbers, two in a byte. A global scale multiplies, or divides."""

    scale: Literal["e4m3", "e8m0"]
    global_scale: Literal["none", "multiplies", "divides"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """One of config_groups."""

    format: str
    targets: tuple[str, ...]
    bits: int
    strategy: Strategy
    group_size: int | None
    symmetric: bool
    permuted: bool
    activations: Literal["float", "int8", "fp8"]
    static: bool


@dataclass(frozen=True, kw_only=True)
class CompressedTensors:
    where: str
    groups: tuple[Group, ...]
    listed: tuple[str, ...]
    name: str = "compressed-tensors"
    outside: frozenset[str] = frozenset({"head_DV"})

    def packing(self, matrix: Matrix) -> Packing | None:
        module = matrix.module
        if any(_means(pattern, module) for pattern in self.listed):
            return None
        for group in self.groups:
            if any(target == "Linear" or _means(target, module) for target in group.targets):
                return _packing(self.where, group, matrix)
        return None

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        if isinstance(code, Fp4Code) and code.scale == "e8m0":
            parts = {**parts, "scale": parts["scale"].view(np.uint8)}
            check_powers("weight_scale", parts["scale"], where)
        else:
            check_finite("weight_scale", parts["scale"], where)
        for name in ("global_scale", "input_scale"):
            if name in parts:
                check_finite(name, parts[name], where)
                if not (parts[name].astype("float32") > 0).all():
                    raise CheckpointError(f"{where}: its {name} must be above 0")
        if not isinstance(code, PackedCode):
            unused = isinstance(code, Fp4Code)  # its inputs are not rounded
            return code, {n: x for n, x in parts.items() if not (unused and n == "input_scale")}
        kept = {name: x for name, x in parts.items() if name not in ("shape", "g_idx")}
        if tuple(parts["shape"]) != code.shape:
            raise CheckpointError(
                f"{where}: its weight_shape is {parts['shape'].tolist()} where the config asks for "
                f"{list(code.shape)}"
            )
        if "zero" in parts:
            _check_zeros(code, parts, where)
        if code.permuted:
            kept["order"] = order_of(parts["g_idx"], code.groups, where)
        return code, kept


def _check_zeros(code: PackedCode, parts: Parts, where: str) -> None:
    """Raise CheckpointError where zeros and numbers lie in words in different ways."""
    (N, K), bits = code.shape, code.bits
    dense = parts["packed"].shape[1] == -(-K * bits // 32)
    words = -(-N * bits // 32) if dense else -(-N // (32 // bits))
    if parts["zero"].shape[0] != words:
        raise CheckpointError(
            f"{where}: its weight_zero_point has {parts['zero'].shape[0]} words for each group; "
            f"in the layout of its weight_packed they are {words}"
        )


def _means(pattern: str, module: str) -> bool:
    """A whole name, or a regular expression."""
    return pattern == module or (pattern.startswith("re:") and covers(pattern, module))


def _packing(where: str, group: Group, matrix: Matrix) -> Packing:
    N, K = matrix.two_axes(where, "compressed-tensors")
    size = {"group": group.group_size}.get(group.strategy) or K
    if K % size:
        raise CheckpointError(
            f"{where}: {matrix.module} has {K} inputs, which do not divide into groups of {size}"
        )
    match group.format:
        case "pack-quantized":
            return _packed(where, group, N, K, K // size)
        case "nvfp4-pack-quantized" | "mxfp4-pack-quantized":
            return fp4_packing(
                f"{where}: {matrix.module}", N, K, nv=group.format.startswith("nv"),
                packed=".weight_packed", global_scale=".weight_global_scale",
                input_scale=".input_global_scale", divides=True,
            )  # fmt: skip
    is_int = group.format == "int-quantized"
    scales: dict[Strategy, tuple[tuple[int, ...], ...]] = {
        "tensor": ((1,), ()),
        "channel": ((N, 1), (N,)),
        "group": ((N, K // size),),
        "block": ((-(-N // FP8_BLOCK), -(-K // FP8_BLOCK)),),
    }
    parts = {
        "weight": Part(
            suffix=".weight", shapes=((N, K),), dtypes=("int8" if is_int else "float8_e4m3fn",)
        ),
        "scale": Part(suffix=".weight_scale", shapes=scales[group.strategy], dtypes=SCALES),
    }
    if group.static:
        parts["input_scale"] = Part(suffix=".input_scale", shapes=((1,), ()), dtypes=SCALES)
    # The products take int8 by channel or by group.
    kept = "channel" if is_int and group.strategy == "tensor" else group.strategy
    form = Form(
        dtype="int8" if is_int else "float8_e4m3fn", scales=kept,
        group=size if kept == "group" else None, activations=group.activations,
        input_scale=group.static,
    )  # fmt: skip
    return Packing(form=form, code=PlainCode(scales=group.strategy), parts=parts)


def _packed(where: str, group: Group, N: int, K: int, G: int) -> Packing:
    bits = group.bits
    loose, dense = -(-K // (32 // bits)), -(-K * bits // 32)
    if loose == dense and 32 % bits:
        raise CheckpointError(
            f"{where}: {K} inputs of {bits} bits take {dense} words in the layout of before May "
            "2026 and in the later one, so which one it is cannot be told"
        )
    parts = {
        "packed": Part(
            suffix=".weight_packed", shapes=tuple(dict.fromkeys(((N, dense), (N, loose)))),
            dtypes=("int32",),
        ),
        "scale": Part(suffix=".weight_scale", shapes=((N, G),), dtypes=SCALES),
        "shape": Part(suffix=".weight_shape", shapes=((2,),), dtypes=("int64", "int32")),
    }  # fmt: skip
    if not group.symmetric:
        zeros = tuple(dict.fromkeys(((-(-N * bits // 32), G), (-(-N // (32 // bits)), G))))
        parts["zero"] = Part(suffix=".weight_zero_point", shapes=zeros, dtypes=("int32",))
    if group.permuted:
        parts["g_idx"] = Part(suffix=".weight_g_idx", shapes=((K,),), dtypes=INDEX)
    small = "int4" if group.symmetric else "uint4"
    form = Form(
        dtype=small if bits <= 4 else "int8", scales="group", group=K // G,
        zero=not group.symmetric, permuted=group.permuted,
    )  # fmt: skip
    code = PackedCode(
        bits=bits, shape=(N, K), groups=G, symmetric=group.symmetric, permuted=group.permuted
    )
    return Packing(form=form, code=code, parts=parts)


def fp4_packing(
    where: str, N: int, K: int, *, nv: bool, packed: str, global_scale: str, input_scale: str,
    divides: bool,
) -> Packing:  # fmt: skip
    """NVFP4's tensors, or MXFP4's, by the suffixes that a format has for them."""
    size = 16 if nv else 32
    if K % size:
        raise CheckpointError(f"{where} has {K} inputs, which do not divide into groups of {size}")
    scale = ("float8_e4m3fn",) if nv else ("uint8", "float8_e8m0fnu")
    parts = {
        "packed": Part(suffix=packed, shapes=((N, K // 2),), dtypes=("uint8",)),
        "scale": Part(suffix=".weight_scale", shapes=((N, K // size),), dtypes=scale),
    }
    if nv:
        one = partial(Part, shapes=((1,), ()), dtypes=("float32",))
        parts["global_scale"] = one(suffix=global_scale)
        parts["input_scale"] = one(suffix=input_scale, optional=True)
    code = Fp4Code(
        scale="e4m3" if nv else "e8m0",
        global_scale=("divides" if divides else "multiplies") if nv else "none",
    )
    form = Form(
        dtype="int4", scales="group", group=size, grid="e2m1",
        scale_dtype="float32" if nv else "bfloat16",
    )  # fmt: skip
    return Packing(form=form, code=code, parts=parts)


KNOWN = frozenset(
    """
    quant_method config_groups format ignore kv_cache_scheme quantization_status version
    global_compression_ratio sparsity_config transform_config moe_sparsity_config
    """.split()
)
INPUTS = (("int", 8), ("float", 8))
# Values of actorder, with those of older files: whether a weight_g_idx says the inputs' groups.
REORDERED, IN_ORDER = ("group", "dynamic", True), ("weight", "static", False)


def read_compressed_tensors(where: str, values: Mapping[str, Any]) -> CompressedTensors:
    """The scheme that a quantization_config of quant_method "compressed-tensors" describes."""
    check_known(where, "compressed-tensors", values, KNOWN)
    check_kind(where, values, dict, "sparsity_config", "transform_config")
    for name in ("sparsity_config", "transform_config"):
        if values.get(name) and values[name].get("format") != "dense":
            raise CheckpointError(
                f"{where}: {name!r} asks for what xlinfer does not compute: {values[name]}"
            )
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not (groups or values.get("kv_cache_scheme")):
        raise CheckpointError(f"{where}: 'config_groups' must name at least one group")
    status = values.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise CheckpointError(
            f"{where}: quantization_status is {status!r}; weights that are read are 'compressed'"
        )
    default = values.get("format")
    return CompressedTensors(
        where=where,
        groups=tuple(_group(f"{where}: {name}", g, default) for name, g in groups.items()),
        listed=check_patterns(values.get("ignore"), f"{where}: 'ignore'"),
    )


def _group(where: str, values: Any, default: Any) -> Group:
    if not isinstance(values, dict) or not isinstance(values.get("weights"), dict):
        raise CheckpointError(f"{where} must have 'weights', an object")
    check_kind(where, values, dict, "input_activations")
    weights, inputs = values["weights"], values.get("input_activations")
    form = values.get("format") or default
    if form not in FORMATS:
        raise CheckpointError(
            f"{where}: format {form!r} is not read; xlinfer reads {', '.join(FORMATS)}"
        )
    if values.get("output_activations"):
        raise CheckpointError(f"{where}: output_activations are quantized, which is not computed")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    is_fp4 = form.startswith(("nvfp4", "mxfp4"))
    wanted = {
        "pack-quantized": ("int", (2, 3, 4, 5, 6, 7, 8)),
        "int-quantized": ("int", (8,)),
        "float-quantized": ("float", (8,)),
        "naive-quantized": (kind, (8,)),
    }.get(form, ("float", (4,)))
    if kind != wanted[0] or bits not in wanted[1]:
        raise CheckpointError(
            f"{where}: format {form} has {wanted[0]} of {' or '.join(map(str, wanted[1]))} bits; "
            f"it says {kind} of {bits}"
        )
    if form == "naive-quantized":
        form = "int-quantized" if kind == "int" else "float-quantized"
    strategies = ("tensor", "channel", "group", "block")
    if strategy not in strategies and not is_fp4:
        raise CheckpointError(
            f"{where}: strategy {strategy!r} is not read; xlinfer reads {', '.join(strategies)}"
        )
    symmetric = weights.get("symmetric", True)
    if not symmetric and form != "pack-quantized":
        raise CheckpointError(f"{where}: {form} with zero points is not read")
    if strategy == "block" and (
        form != "float-quantized" or weights.get("block_structure") != [FP8_BLOCK, FP8_BLOCK]
    ):
        raise CheckpointError(
            f"{where}: blocks must be of e4m3 and 128 x 128; they are "
            f"{weights.get('block_structure')} of {form}"
        )
    size = weights.get("group_size")
    if strategy == "group" and (type(size) is not int or size < 1):
        raise CheckpointError(f"{where}: 'group_size' is {size!r}; it must be above 0")
    if (order := weights.get("actorder")) not in (None, *REORDERED, *IN_ORDER):
        raise CheckpointError(
            f"{where}: 'actorder' is {order!r}; it must be null, 'group' or 'weight'"
        )
    activations, static = _activations(where, inputs, is_fp4)
    return Group(
        format=form, targets=check_patterns(values.get("targets"), f"{where}: 'targets'"),
        bits=bits, strategy=strategy if not is_fp4 else "group", group_size=size,
        symmetric=symmetric, permuted=order in REORDERED,
        activations=activations, static=static,
    )  # fmt: skip


def _activations(
    where: str, inputs: Any, is_fp4: bool
) -> tuple[Literal["float", "int8", "fp8"], bool]:
    """What products round their inputs to, and whether by a scale of the file's own."""
    if not inputs or is_fp4:  # 4-bit inputs are not rounded: products take them as they are
        return "float", False
    kind, bits = inputs.get("type", "int"), inputs.get("num_bits")
    if (kind, bits) not in INPUTS or not inputs.get("symmetric", True):
        raise CheckpointError(
            f"{where}: input_activations of {kind} with {bits} bits"
            + ("" if inputs.get("symmetric", True) else " and zero points")
            + " are not computed; xlinfer has int and float of 8 bits, symmetric"
        )
    return ("int8" if kind == "int" else "fp8"), not inputs.get("dynamic", False)
