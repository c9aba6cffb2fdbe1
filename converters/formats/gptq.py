"""GPTQ's layout (AutoGPTQ, GPTQModel): integers of 2, 3, 4 or 8 bits in int32 words along K.

For b bits, W = 32/b numbers a word (3 bits: 32 numbers in 3 words, one stream of bits):

    qweight  int32 [K/W, N]   number i of row r is input W r + i, unsigned
    qzeros   int32 [G, N/W]   number i of column c is output W c + i
    scales   float16 [G, N]
    g_idx    int32 [K]        the group of each input; absent: in order

w = scale * (q - zero). "v2" files hold zero. "v1" files hold zero - 1: GPTQModel subtracts LESS
from the words, AutoGPTQ one from each number. That is the same but for zeros of 0, which AutoGPTQ
cannot hold, and for 3 bits. What a file says of itself is wrong in published ones, so where the
zero is known, the data decides.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from converters.errors import CheckpointError
from converters.formats.packing import (
    Code,
    Matrix,
    Packing,
    Part,
    Parts,
    check_expression,
    check_finite,
    check_kind,
    check_known,
    check_patterns,
    covers,
)
from xlinfer.forms import Form

BITS = (2, 3, 4, 8)
SCALES = ("float16", "bfloat16", "float32")
INDEX = ("int32", "int64")
# One in each number; of 3 bits for words 0, 1 and 2 of three, where it is one in 1 alone.
LESS: Mapping[int, tuple[int, ...]] = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}


@dataclass(frozen=True, kw_only=True)
class GptqCode:
    bits: int
    groups: int
    # "v1, each": one less in each number. symmetric: all are half of the range, and dropped.
    zeros: Literal["v1", "v1, each", "v2", "symmetric"]
    permuted: bool


@dataclass(frozen=True, kw_only=True)
class Gptq:
    where: str  # begins errors
    bits: int
    group_size: int  # -1: all inputs
    symmetric: bool
    permuted: bool  # desc_act: groups are of inputs that lie apart
    checkpoint_format: Literal["v1", "v2"]  # as the file says
    gptqmodel: bool  # it wrote the file
    lm_head: bool
    blocks: tuple[str, ...] | None  # the modules of a layer that are quantized; None: all
    dynamic: Mapping[str, Any]  # pattern of modules -> what is different for them
    name: str = "gptq"
    listed: tuple[str, ...] = ()
    outside: frozenset[str] = frozenset({"head_DV"})

    def packing(self, matrix: Matrix) -> Packing | None:
        module = matrix.module
        own = self._of(module)
        if own is None:
            return None
        (N, K), bits = matrix.two_axes(self.where, self.name), own.bits
        group = K if own.group_size == -1 else own.group_size
        if K % group or K * bits % 32 or N * bits % 32:
            raise CheckpointError(
                f"{self.where}: {module} is [{N}, {K}], which does not divide into groups of "
                f"{group} and words of 32 bits for {bits} bits"
            )
        G = K // group
        parts = {
            "qweight": Part(suffix=".qweight", shapes=((K * bits // 32, N),), dtypes=("int32",)),
            "qzeros": Part(suffix=".qzeros", shapes=((G, N * bits // 32),), dtypes=("int32",)),
            "scales": Part(suffix=".scales", shapes=((G, N),), dtypes=SCALES),
            "g_idx": Part(suffix=".g_idx", shapes=((K,),), dtypes=INDEX, optional=True),
        }
        form = Form(
            dtype="int8" if bits == 8 else "int4" if own.symmetric else "uint4",
            scales="group", group=group, zero=not own.symmetric, permuted=own.permuted,
        )  # fmt: skip
        zeros = "symmetric" if own.symmetric else own.checkpoint_format
        if zeros == "v1" and bits == 3 and not self.gptqmodel:
            zeros = "v1, each"
        code = GptqCode(bits=bits, groups=G, zeros=zeros, permuted=own.permuted)
        return Packing(form=form, code=code, parts=parts)

    def _of(self, module: str) -> "Gptq | None":
        """With what `dynamic` changes for the module; None: it is not quantized."""
        if covers("lm_head", module) and not self.lm_head:
            return None
        if self.blocks is not None and not any(covers(block, module) for block in self.blocks):
            return None
        for pattern, changes in self.dynamic.items():
            if re.match(_expression(pattern), module) is not None:
                return None if pattern.startswith("-:") else _changed(self, pattern, changes)
        return self

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        assert isinstance(code, GptqCode)
        check_finite("scales", parts["scales"], where)
        kept = {name: x for name, x in parts.items() if name != "g_idx"}
        if code.zeros == "symmetric":
            _check_middle(parts["qzeros"], code.bits, where)
            kept.pop("qzeros")
        K = parts["qweight"].shape[0] * 32 // code.bits
        g_idx = parts.get("g_idx", np.arange(K) // (K // code.groups))
        order = order_of(g_idx, code.groups, where)
        if code.permuted:
            kept["order"] = order
        elif (order != np.arange(K)).any():
            raise CheckpointError(
                f"{where}: its g_idx reorders the inputs, and desc_act is false; one of them is "
                "wrong"
            )
        return code, kept


def _expression(pattern: str) -> str:
    """Of a key of `dynamic`, whose sign says whether what it means is quantized."""
    return pattern.removeprefix("+:").removeprefix("-:")


def order_of(g_idx: np.ndarray, groups: int, where: str) -> np.ndarray:
    """The inputs in the order of their groups, int32 [K]."""
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(
            f"{where}: its g_idx goes from {g_idx.min()} to {g_idx.max()}, and there are {groups} "
            "groups, numbered from 0"
        )
    sizes = np.bincount(g_idx, minlength=groups)
    if (sizes != len(g_idx) // groups).any():
        raise CheckpointError(
            f"{where}: by its g_idx the groups have {sizes.min()} to {sizes.max()} inputs; each "
            f"must have {len(g_idx) // groups}"
        )
    return np.argsort(g_idx, kind="stable").astype(np.int32)


def _check_middle(qzeros: np.ndarray, bits: int, where: str) -> None:
    """Raise CheckpointError unless all zeros are half of the range, as v1 or as v2 has it."""
    words = qzeros.view(np.uint32)
    half = 1 << (bits - 1)
    v2, each = (_repeated(value, bits, words.shape[1]) for value in (half, half - 1))
    v1 = v2 - np.resize(np.array(LESS[bits], np.uint32), words.shape[1])
    if not any((words == row).all() for row in (v2, v1, each)):
        raise CheckpointError(
            f"{where}: sym is true, but its zero points are not all {half} (v2) or {half - 1} "
            f"(v1); the first word is {words.flat[0]:#010x}"
        )


def _repeated(value: int, bits: int, words: int) -> np.ndarray:
    """A stream of bits that holds `value` over and over, uint32 [words]."""
    count = words * 32 // bits
    stream = sum(value << (bits * i) for i in range(count))
    return np.frombuffer(stream.to_bytes(4 * words, "little"), np.uint32)


def _changed(scheme: Gptq, pattern: str, changes: Any) -> Gptq:
    known = {"bits", "group_size", "sym", "desc_act"}
    if not isinstance(changes, dict) or not changes.keys() <= known:
        raise CheckpointError(
            f"{scheme.where}: 'dynamic' of {pattern!r} is {changes!r}; xlinfer knows "
            f"{', '.join(sorted(known))}"
        )
    return replace(scheme, **_choices(scheme.where, {**_as_config(scheme), **changes}))


def _as_config(scheme: Gptq) -> dict[str, Any]:
    return {
        "bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric,
        "desc_act": scheme.permuted,
    }  # fmt: skip


def _choices(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    bits, group = values.get("bits"), values.get("group_size", 128)
    if bits not in BITS or type(bits) is not int:
        raise CheckpointError(f"{where}: 'bits' is {bits!r}; GPTQ has {', '.join(map(str, BITS))}")
    if type(group) is not int or (group != -1 and group < 1):
        raise CheckpointError(f"{where}: 'group_size' is {group!r}; it must be above 0, or -1")
    flags = {"sym": values.get("sym", True), "desc_act": values.get("desc_act", False)}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise CheckpointError(f"{where}: {name!r} is {flag!r}; it must be true or false")
    return {
        "bits": bits, "group_size": group, "symmetric": flags["sym"], "permuted": flags["desc_act"],
    }  # fmt: skip


FORMATS: Mapping[str, Literal["v1", "v2"]] = {"gptq": "v1", "gptq_v2": "v2"}
# How it was made, or what a reader of old files needs.
HARMLESS = frozenset(
    """
    quant_method method damp_percent damp_auto_increment true_sequential static_groups meta dataset
    tokenizer model_name_or_path model_file_base_name batch_size use_exllama exllama_config
    max_input_length use_cuda_fp16 model_seqlen block_name_to_quantize
    module_name_preceding_first_block pad_token_id disable_exllama cache_block_outputs
    backend pack_dtype is_marlin_format quantizer versions adapter hyb_act act_group_aware
    """.split()
)
USED = frozenset(
    """
    bits group_size sym desc_act checkpoint_format format lm_head dynamic
    modules_in_block_to_quantize
    """.split()
)


def read_gptq(where: str, values: Mapping[str, Any]) -> Gptq:
    """The scheme that a quantization_config of quant_method "gptq" describes."""
    check_known(where, "GPTQ", values, HARMLESS | USED)
    check_kind(where, values, dict, "dynamic", "meta")
    check_kind(where, values, str, "checkpoint_format", "format")
    check_kind(where, values, list, "modules_in_block_to_quantize")
    check_kind(where, values, bool, "lm_head")
    said = values.get("checkpoint_format") or values.get("format") or "gptq"
    if said not in FORMATS:
        raise CheckpointError(
            f"{where}: checkpoint_format {said!r} is not read; xlinfer reads {', '.join(FORMATS)}"
        )
    if values.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(f"{where}: pack_dtype {values['pack_dtype']!r}; it must be 'int32'")
    blocks = values.get("modules_in_block_to_quantize")
    if blocks is not None:  # in lists, of modules that are quantized one after the other
        blocks = [m for b in blocks for m in (b if isinstance(b, list) else [b])]
        blocks = check_patterns(blocks, f"{where}: 'modules_in_block_to_quantize'")
    dynamic, meta = values.get("dynamic") or {}, values.get("meta") or {}
    for pattern in dynamic:
        check_expression(_expression(pattern), f"{where}: 'dynamic' holds {pattern!r}")
    return Gptq(
        where=where, checkpoint_format=FORMATS[said],
        gptqmodel="gptqmodel" in str(meta.get("quantizer")),
        lm_head=bool(values.get("lm_head", False)), blocks=blocks,
        dynamic=dynamic, **_choices(where, values),
    )  # fmt: skip
