"""bitsandbytes' layouts, as transformers saves them.

4 bits: the matrix [N, K], row after row, in blocks of 64 numbers.
    weight               uint8 [N K / 2, 1], the HIGH nibble first; also typed as another dtype
    weight.absmax        float32 [B], the scale of each block; with double quantization uint8
    weight.quant_map     float32 [16], what each number stands for
    weight.nested_absmax, weight.nested_quant_map
                         float32 [B/256] and [256]: absmax = map[uint8] * nested_absmax + offset
    weight.quant_state.bitsandbytes__nf4 (or __fp4)
                         uint8, a JSON object with shape, blocksize and nested_offset
8 bits: weight int8 [N, K], SCB float32 [N]; w = q * SCB / 127. LLM.int8 multiplies outlying inputs
in 16 bits and rounds the others; here no input is rounded.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from converters.errors import CheckpointError
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
    covers,
)
from xlinfer.forms import TABLES, Form

BLOCK = 64  # what transformers writes, and has no setting for
NESTED = 256  # scales under one scale of scales
STATE = "bitsandbytes__"


@dataclass(frozen=True, kw_only=True)
class Bits4Code:
    grid: Literal["nf4", "fp4"]
    shape: tuple[int, int]
    nested: bool


@dataclass(frozen=True, kw_only=True)
class Bits8Code:
    pass


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes:
    where: str
    grid: Literal["nf4", "fp4"] | None  # None: 8 bits
    nested: bool
    storage: str  # the dtype that bytes are said to have
    listed: tuple[str, ...]
    name: str = "bitsandbytes"
    outside: frozenset[str] = frozenset()

    def packing(self, matrix: Matrix) -> Packing | None:
        if any(covers(pattern, matrix.module) for pattern in self.listed):
            return None
        N, K = matrix.two_axes(self.where, self.name)
        if self.grid is None:
            parts = {
                "weight": Part(suffix=".weight", shapes=((N, K),), dtypes=("int8",)),
                "SCB": Part(suffix=".SCB", shapes=((N,),), dtypes=("float32",)),
                "format": Part(
                    suffix=".weight_format", shapes=((),), dtypes=("uint8",), optional=True
                ),
            }
            form = Form(dtype="int8", scales="channel")
            return Packing(form=form, code=Bits8Code(), parts=parts)
        blocks, size = -(-N * K // BLOCK), np.dtype(_numpy(self.storage)).itemsize
        numbers = (N * K + 1) // 2 // size
        scale = "uint8" if self.nested else "float32"
        state = Part(suffix=f".weight.quant_state.{STATE}{self.grid}", shapes=(), dtypes=("uint8",))
        parts = {
            "weight": Part(
                suffix=".weight", shapes=((numbers, 1), (numbers,)), dtypes=(_numpy(self.storage),)
            ),
            "absmax": Part(suffix=".weight.absmax", shapes=((blocks,),), dtypes=(scale,)),
            "map": Part(suffix=".weight.quant_map", shapes=((16,),), dtypes=("float32",)),
            "state": state,
        }
        if self.nested:
            count = -(-blocks // NESTED)
            parts |= {
                "nested_absmax": Part(
                    suffix=".weight.nested_absmax", shapes=((count,),), dtypes=("float32",)
                ),
                "nested_map": Part(
                    suffix=".weight.nested_quant_map", shapes=((256,),), dtypes=("float32",)
                ),
            }
        code = Bits4Code(grid=self.grid, shape=(N, K), nested=self.nested)
        if K % BLOCK:
            why = f"its rows of {K} do not end where blocks of {BLOCK} do"
            return Packing(form=None, code=code, parts=parts, why=why)
        form = Form(dtype="uint4", scales="group", group=BLOCK, grid=self.grid)
        return Packing(form=form, code=code, parts=parts)

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        if isinstance(code, Bits8Code):
            check_finite("SCB", parts["SCB"], where)
            if "format" in parts and int(parts["format"]) != 0:
                raise CheckpointError(
                    f"{where}: weight_format is {int(parts['format'])}; xlinfer reads 0, by rows"
                )
            return code, {name: x for name, x in parts.items() if name != "format"}
        assert isinstance(code, Bits4Code)
        state = _state(parts["state"], where)
        wanted = {"quant_type": code.grid, "blocksize": BLOCK, "shape": list(code.shape)}
        wrong = {n: state.get(n) for n, value in wanted.items() if state.get(n) != value}
        if wrong:
            raise CheckpointError(f"{where}: its quant_state says {wrong} where {wanted} is read")
        if not np.allclose(parts["map"], TABLES[code.grid], rtol=0, atol=1e-6):
            raise CheckpointError(f"{where}: its quant_map is not that of {code.grid}")
        kept = {"weight": parts["weight"].reshape(-1).view(np.uint8), "absmax": parts["absmax"]}
        if code.nested:
            offset = state.get("nested_offset")
            if not isinstance(offset, int | float) or not math.isfinite(offset):
                raise CheckpointError(f"{where}: nested_offset is {offset!r}, not a number")
            kept |= {name: parts[name] for name in ("nested_absmax", "nested_map")}
            kept["offset"] = np.float32(offset)
        for name in kept.keys() - {"weight", "offset"}:
            check_finite(name, kept[name], where)
        return code, kept


def _state(raw: np.ndarray, where: str) -> Mapping[str, Any]:
    try:
        state = json.loads(raw.tobytes())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{where}: its quant_state is not JSON") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: its quant_state is no object")
    return state


def _numpy(storage: str) -> str:
    return storage.removeprefix("torch.")


KNOWN = frozenset(
    """
    quant_method load_in_4bit load_in_8bit _load_in_4bit _load_in_8bit bnb_4bit_compute_dtype
    bnb_4bit_quant_storage bnb_4bit_quant_type bnb_4bit_use_double_quant llm_int8_threshold
    llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules
    """.split()
)
STORAGES = ("uint8", "bfloat16", "float16", "float32")


def read_bitsandbytes(where: str, values: Mapping[str, Any]) -> BitsAndBytes:
    """The scheme that a quantization_config of quant_method "bitsandbytes" describes."""
    check_known(where, "bitsandbytes", values, KNOWN)
    four, eight = values.get("load_in_4bit", False), values.get("load_in_8bit", False)
    if four == eight:
        raise CheckpointError(
            f"{where}: one of 'load_in_4bit' and 'load_in_8bit' must be true; they are {four} and "
            f"{eight}"
        )
    grid = values.get("bnb_4bit_quant_type", "fp4")
    if four and grid not in ("nf4", "fp4"):
        raise CheckpointError(f"{where}: bnb_4bit_quant_type {grid!r}; it must be nf4 or fp4")
    check_kind(where, values, str, "bnb_4bit_quant_storage")
    storage = values.get("bnb_4bit_quant_storage") or "uint8"
    if _numpy(storage) not in STORAGES:
        raise CheckpointError(
            f"{where}: bnb_4bit_quant_storage {storage!r} is not one of {', '.join(STORAGES)}"
        )
    return BitsAndBytes(
        where=where, grid=grid if four else None, storage=storage,
        nested=bool(values.get("bnb_4bit_use_double_quant", False)),
        listed=check_patterns(
            values.get("llm_int8_skip_modules"), f"{where}: 'llm_int8_skip_modules'"
        ),
    )  # fmt: skip
