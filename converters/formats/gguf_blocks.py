"""The blocks of GGUF as forms: each type keeps its own numbers and scales."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import CheckpointError
from converters.formats.packing import Code, Matrix, Packing, Part, Parts, check_known
from xlinfer.forms import Form

FORMS: Mapping[str, Form] = {
    "Q4_0": Form(dtype="int4", scales="group", group=32, scale_dtype="float16"),
    "Q4_1": Form(dtype="uint4", scales="group", group=32, zero=True),
    "Q5_0": Form(dtype="int8", scales="group", group=32, scale_dtype="float16"),
    "Q5_1": Form(dtype="int8", scales="group", group=32, zero=True),
    "Q8_0": Form(dtype="int8", scales="group", group=32, scale_dtype="float16"),
    "Q2_K": Form(dtype="uint4", scales="group", group=16, zero=True),
    "Q3_K": Form(dtype="int4", scales="group", group=16),
    "Q4_K": Form(dtype="uint4", scales="group", group=32, zero=True),
    "Q5_K": Form(dtype="int8", scales="group", group=32, zero=True),
    "Q6_K": Form(dtype="int8", scales="group", group=16),
    "IQ4_NL": Form(dtype="uint4", scales="group", group=32, grid="iq4_nl", scale_dtype="float16"),
    "IQ4_XS": Form(dtype="uint4", scales="group", group=32, grid="iq4_nl"),
    "MXFP4": Form(dtype="int4", scales="group", group=32, grid="e2m1", scale_dtype="bfloat16"),
}


@dataclass(frozen=True)
class GgufCode:
    blocks: str  # their type


@dataclass(frozen=True, kw_only=True)
class GgufBlocks:
    """`types` are those of the tensors that are not floats, by their names in the family."""

    where: str
    types: Mapping[str, str]
    name: str = "gguf"
    listed: tuple[str, ...] = ()
    outside: frozenset[str] = frozenset({"embed_VD", "head_DV"})

    def packing(self, matrix: Matrix) -> Packing | None:
        blocks = self.types.get(matrix.tensor)
        if blocks is None:
            return None
        part = Part(suffix=None, shapes=(matrix.stored,), dtypes=("uint8",))
        return Packing(form=FORMS[blocks], code=GgufCode(blocks), parts={"weight": part})

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        return code, parts


def read_gguf_blocks(where: str, values: Mapping[str, Any]) -> GgufBlocks:
    """The scheme that `quantization_config` of a GGUF's document describes."""
    check_known(where, "gguf", values, ("quant_method", "types"))
    types = values.get("types")
    if not isinstance(types, dict) or not all(
        isinstance(blocks, str) and blocks in FORMS for blocks in types.values()
    ):
        raise CheckpointError(
            f"{where}: 'types' must name the block of each tensor, one of {', '.join(FORMS)}"
        )
    return GgufBlocks(where=where, types=types)
