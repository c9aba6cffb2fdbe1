"""AWQ's layouts (AutoAWQ): 4-bit integers in int32 words, a scale and a zero for each group.

    gemm  qweight int32 [K, N/8]   nibble i of column c is output 8 c + ORDER[i]
          qzeros  int32 [G, N/8]   the same
          scales  float16 [G, N]
    gemv  qweight int32 [N, K/8]   nibble i of column c is input 8 c + i
          qzeros  int32 [N, W]     nibble i of column c is group 8 c + i; the last ones are padding
          scales  float16 [N, 8 W]

w = scale * (q - zero).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converters.errors import CheckpointError
from converters.formats.packing import (
    Code,
    Matrix,
    Packing,
    Part,
    Parts,
    check_finite,
    check_known,
    check_patterns,
    covers,
)
from xlinfer.forms import Form

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
DTYPES: Mapping[str, tuple[str, ...]] = {
    "qweight": ("int32",),
    "qzeros": ("int32",),
    "scales": ("float16", "bfloat16", "float32"),
}


@dataclass(frozen=True, kw_only=True)
class AwqCode:
    version: Literal["gemm", "gemv"]
    groups: int


@dataclass(frozen=True, kw_only=True)
class Awq:
    where: str
    version: Literal["gemm", "gemv"]
    group_size: int  # -1: all inputs
    listed: tuple[str, ...]
    name: str = "awq"
    outside: frozenset[str] = frozenset()

    def packing(self, matrix: Matrix) -> Packing | None:
        module = matrix.module
        if any(covers(p, module) for p in self.listed):
            return None
        N, K = matrix.two_axes(self.where, self.name)
        group = K if self.group_size == -1 else self.group_size
        if K % group or (N if self.version == "gemm" else K) % 8:
            raise CheckpointError(
                f"{self.where}: {module} is [{N}, {K}], which does not divide into groups of "
                f"{group} and words of 8 numbers"
            )
        G = K // group
        if self.version == "gemm":
            shapes = {"qweight": (K, N // 8), "qzeros": (G, N // 8), "scales": (G, N)}
        else:
            words = _zero_words(G, group)
            shapes = {"qweight": (N, K // 8), "qzeros": (N, words), "scales": (N, 8 * words)}
        parts = {
            role: Part(suffix=f".{role}", shapes=(given,), dtypes=DTYPES[role])
            for role, given in shapes.items()
        }
        form = Form(dtype="uint4", scales="group", group=group, zero=True)
        return Packing(form=form, code=AwqCode(version=self.version, groups=G), parts=parts)

    def settle(self, code: Code, parts: Parts, where: str) -> tuple[Code, Parts]:
        check_finite("scales", parts["scales"], where)
        return code, parts


def _zero_words(groups: int, group: int) -> int:
    """Words of zeros of an output in gemv: a whole number of the kernel's 128-bit loads."""
    multiple = {32: 4, 64: 2}.get(group, 1)
    words = -(-groups // 8)
    return -(-words // multiple) * multiple


KNOWN = frozenset(
    """
    quant_method bits group_size zero_point version modules_to_not_convert backend do_fuse
    fuse_max_seq_len modules_to_fuse exllama_config w_bit q_group_size
    """.split()
)


def read_awq(where: str, values: Mapping[str, Any]) -> Awq:
    """The scheme that a quantization_config of quant_method "awq" describes."""
    check_known(where, "AWQ", values, KNOWN)
    bits = values.get("bits", values.get("w_bit", 4))
    group = values.get("group_size", values.get("q_group_size", 128))
    version = str(values.get("version", "gemm")).lower()
    if bits != 4:
        raise CheckpointError(f"{where}: 'bits' is {bits!r}; AWQ has 4")
    if type(group) is not int or (group != -1 and group < 1):
        raise CheckpointError(f"{where}: 'group_size' is {group!r}; it must be above 0, or -1")
    if version not in ("gemm", "gemv"):
        raise CheckpointError(
            f"{where}: AWQ's version {version!r} is not read; xlinfer reads gemm and gemv"
        )
    if values.get("zero_point", True) is not True:
        raise CheckpointError(f"{where}: 'zero_point' is not true; AWQ's layouts have zero points")
    listed = check_patterns(
        values.get("modules_to_not_convert"), f"{where}: 'modules_to_not_convert'"
    )
    return Awq(
        where=where, version="gemm" if version == "gemm" else "gemv", group_size=group,
        listed=listed,
    )  # fmt: skip
