"""The forms that weights come in: what their dtype and the shape of their scales say."""

from typing import Literal, NamedTuple

import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.grids import Grid, dtype_of
from pallas_kernels.tuning import key, up_to

BLOCK = 128  # of N and of K, under one scale of block e4m3
GROUPS = (16, 32, 64, 128)  # of K under one scale of an integer; or all of K

Kind = Literal["float", "int8", "int8_groups", "int4", "fp8_tensor", "fp8_channel", "fp8_block"]


class Form(NamedTuple):
    kind: Kind
    group: int  # input features under one scale
    grid: Grid = "int"  # what int4 stands for

    @property
    def is_fp8(self) -> bool:
        return self.kind.startswith("fp8")

    @property
    def in_groups(self) -> bool:
        return self.kind in ("int4", "int8_groups")

    @property
    def scales_vary_over_k(self) -> bool:
        return self.in_groups or self.kind == "fp8_block"


def tuning_key(x_MK, w_ENK, E: int, scale, form: Form) -> str:
    """What decides tiles; of a stack w_ENK has more than E experts."""
    name = lambda a: "none" if a is None else jnp.dtype(a.dtype).name
    w = "e2m1" if form.grid == "e2m1" else name(w_ENK)
    return key(
        M=up_to(x_MK.shape[0]), E=E, N=w_ENK.shape[1], K=w_ENK.shape[2], form=form.kind,
        group=form.group, x=name(x_MK), w=w, scale=name(scale),
    )  # fmt: skip


def form_of(x_MK, w_ENK, scale, zero, grid: Grid = "int") -> Form:
    """The form of checked weights; ValueError where scale, zero or grid does not fit it."""
    E, N, K = w_ENK.shape
    name = w_ENK.dtype.name
    if grid != "int":
        checks.check_dtype("w_ENK", w_ENK, (dtype_of(grid, zeros=zero is not None),))
    if zero is not None and (name not in ("uint4", "int8") or scale is None or scale.ndim != 3):
        raise ValueError(f"zero is given, but w_ENK is {name}; only uint4 and int8 in groups have")
    if w_ENK.dtype == x_MK.dtype:
        if scale is not None:
            raise ValueError(f"scale is given, but w_ENK is {name}; it has none")
        return Form("float", K)
    if scale is None:
        raise ValueError(f"scale is None; weights of {name} need one")
    if name == "float8_e4m3fn":
        checks.check_dtype("scale", scale, ("float32",))
        blocks = (-(-N // BLOCK), -(-K // BLOCK))
        forms: dict[int, tuple[Kind, int, tuple[int, ...]]] = {
            1: ("fp8_tensor", K, (E,)),
            2: ("fp8_channel", K, (E, N)),
            3: ("fp8_block", BLOCK, (E, *blocks)),
        }
        if scale.ndim not in forms:
            raise ValueError(f"scale has {scale.ndim} axes; e4m3 weights take 1, 2 or 3")
        kind, group, shape = forms[scale.ndim]
        checks.check_shape("scale", scale, shape, why=f"w_ENK is {tuple(w_ENK.shape)}")
        return Form(kind, group)
    checks.check_dtype("scale", scale, dict.fromkeys((x_MK.dtype.name, "float32")))
    if name == "int8" and scale.ndim == 2:
        checks.check_shape("scale", scale, (E, N), why="one for each output channel")
        return Form("int8", K)
    checks.check_rank("scale", scale, 3)
    G = scale.shape[1]
    checks.check_shape("scale", scale, (E, G, N), why="groups of K before output channels")
    if G == 0 or K % G or K // G not in (*GROUPS, K):
        raise ValueError(f"scale has {G} groups for K = {K}; K/G must be 16, 32, 64, 128 or K")
    if name == "uint4" and zero is None and grid == "int":
        raise ValueError("zero is None; uint4 integers need one")
    if zero is not None:
        checks.check_shape("zero", zero, (E, G, N), why="every scale has a zero")
        checks.check_dtype("zero", zero, (scale.dtype,))
    return Form("int8_groups" if name == "int8" else "int4", K // G, grid)
