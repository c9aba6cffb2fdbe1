"""How a matrix stays in memory where it is kept in few bits. Plain data, no jax.

K inputs   N outputs   G groups of K/G inputs each
"""

from dataclasses import dataclass
from typing import Literal

FP8_BLOCK = 128  # inputs and outputs that share a scale
# What a number stands for before its scale: itself; as int4, its sign and the place in E2M1 of its
# magnitude, in half steps; as uint4, a place in one of TABLES.
Grid = Literal["int", "e2m1", "nf4", "fp4", "iq4_nl"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """Numbers [N, K] of `dtype`, each of which stands for (number - zero) * scale.

    scales: "tensor" one; "channel" [N]; "group" [G, N]; "block" [ceil(N/128), ceil(K/128)].
    """

    dtype: Literal["int4", "uint4", "int8", "float8_e4m3fn"]
    scales: Literal["tensor", "channel", "group", "block"]
    group: int | None = None  # inputs under one scale of "group"
    zero: bool = False  # [G, N], of "group"
    grid: Grid = "int"
    # What holds the scales without rounding. Kept in it where activations have it too, else in
    # float32: kernels take these two.
    scale_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    permuted: bool = False  # input k of the numbers is input order_K[k] of the matrix
    # What a product rounds its inputs to, by token unless there is an input_scale.
    activations: Literal["float", "int8", "fp8"] = "float"
    input_scale: bool = False  # the activations' own, one number

    def describe(self) -> str:
        """In a few words, for tables and errors."""
        by = {"group": f"groups of {self.group}", "block": f"{FP8_BLOCK}x{FP8_BLOCK} blocks"}
        kind = self.dtype if self.grid == "int" else self.grid
        return ", ".join(
            [
                f"{kind} by {by.get(self.scales, self.scales)}",
                *(["zero points"] if self.zero else []),
                *(["reordered inputs"] if self.permuted else []),
                *([f"{self.activations} activations"] if self.activations != "float" else []),
                *(["static"] if self.input_scale else []),
            ]
        )

    def shapes(self, N: int, K: int) -> dict[str, tuple[int, ...]]:
        """Of each of a QTensor's arrays for one matrix."""
        scale = {
            "tensor": (),
            "channel": (N,),
            "group": (K // (self.group or K), N),
            "block": (-(-N // FP8_BLOCK), -(-K // FP8_BLOCK)),
        }[self.scales]
        return {
            "data_NK": (N, K),
            "scale": scale,
            **({"zero_GN": scale} if self.zero else {}),
            **({"order_K": (K,)} if self.permuted else {}),
            **({"input_scale": ()} if self.input_scale else {}),
        }


INT4_GROUP = 128  # inputs under one scale of what is rounded here, where that divides them
METHODS = ("int4", "int8", "fp8")


def form_of(method: str, K: int) -> Form:
    """What weights with K inputs are rounded to by --quantization.

    int4: groups of INT4_GROUP inputs, or all inputs where that does not divide them. int8: output
    channels. fp8: blocks of FP8_BLOCK x FP8_BLOCK.
    """
    match method:
        case "int4":
            group = INT4_GROUP if K % INT4_GROUP == 0 else K
            return Form(dtype="int4", scales="group", group=group)
        case "int8":
            return Form(dtype="int8", scales="channel")
        case "fp8":
            return Form(dtype="float8_e4m3fn", scales="block", activations="fp8")
    raise ValueError(f"quantization is {method!r}; it must be one of {', '.join(METHODS)}")


E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # half steps, by exponent and mantissa (OCP MX, 5.3.3)
# Of uint4 numbers, what each of 0 to 15 stands for.
TABLES: dict[Grid, tuple[float, ...]] = {
    # Quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E).
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # bitsandbytes' own 4-bit float, over its largest.
    "fp4": (
        0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4,
        -0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4,
    ),
    "iq4_nl": (
        -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
        1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
    ),
}  # fmt: skip
