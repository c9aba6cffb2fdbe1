"""MXFP4 as gpt-oss has it, for all experts of a layer in one tensor.

..._blocks  uint8 [E, N, K/32, 16]   two e2m1 numbers in a byte, the low nibble first
..._scales  uint8 [E, N, K/32]       E8M0: 2^(u - 127)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import CheckpointError
from converters.formats.compressed_tensors import Fp4Code
from converters.formats.packing import (
    Code,
    Matrix,
    Packing,
    Part,
    Parts,
    check_known,
    check_patterns,
    check_powers,
    covers,
)
from xlinfer.forms import Form

GROUP = 32


@dataclass(frozen=True, kw_only=True)
class Mxfp4:
    where: str
    listed: tuple[str, ...]
    name: str = "mxfp4"
    outside: frozenset[str] = frozenset()

    def packing(self, matrix: Matrix) -> Packing | None:
        if any(covers(pattern, matrix.module) for pattern in self.listed):
            return None
        if len(matrix.shape) != 3:  # it is the experts' format
            return None
        E, N, K = matrix.shape
        if K % GROUP:
            raise CheckpointError(
                f"{self.where}: {matrix.tensor} has {K} inputs, which do not divide into groups of "
                f"{GROUP}"
            )
        parts = {
            "packed": Part(suffix="_blocks", shapes=((E, N, K // GROUP, 16),), dtypes=("uint8",)),
            "scale": Part(suffix="_scales", shapes=((E, N, K // GROUP),), dtypes=("uint8",)),
        }
        form = Form(dtype="int4", scales="group", group=GROUP, grid="e2m1", scale_dtype="bfloat16")
        return Packing(form=form, code=Fp4Code(scale="e8m0", global_scale="none"), parts=parts)

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        check_powers("scale", parts["scale"], where)
        return code, parts


def read_mxfp4(where: str, values: Mapping[str, Any]) -> Mxfp4:
    """The scheme that a quantization_config of quant_method "mxfp4" describes."""
    check_known(where, "mxfp4", values, {"quant_method", "modules_to_not_convert", "dequantize"})
    return Mxfp4(
        where=where,
        listed=check_patterns(
            values.get("modules_to_not_convert"), f"{where}: 'modules_to_not_convert'"
        ),
    )
