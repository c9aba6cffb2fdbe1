"""What programs are compiled and planned for: so many devices of a kind, and what each can do.

A Target is a value. Adding hardware is adding a row to CHIPS; what kernels need to know of it is
a row of pallas_kernels.devices. No jax.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

GB, GiB, TB, T = 10**9, 2**30, 10**12, 10**12


class TargetError(ValueError):
    """No such target, or none that can do what is asked."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Rates are peaks of the data sheets, for dense matrices, of one device as jax counts them."""

    name: str  # of pallas_kernels.devices, where kernels exist for it
    platform: str
    memory_bytes: int  # that a program may use
    bandwidth: float  # bytes of device memory per second
    # Per second, by the dtype of the operands. float32 is what XLA's default precision makes of
    # it: TF32 on GPUs, one pass of bfloat16 on TPUs.
    flops: Mapping[str, float]
    link: float  # bytes per second to the other devices, each way, all links together
    host_link: float  # bytes per second from a host's memory to its devices, together
    per_chip: int = 1  # devices of a chip: what is bought and named
    per_host: int = 1  # chips of a host where the slice has several hosts
    # Chips of a slice -> its shape, as libtpu names it. Those up to `one_host` are on one host.
    slices: Mapping[int, str] = field(default_factory=dict)
    one_host: int = 1
    refused: str = ""  # why nothing is compiled for it; empty where it is
    planned_as: str = ""  # then the chip whose kernels' layouts a plan for it takes


def _slices(*shapes: str) -> dict[int, str]:
    return {math.prod(map(int, shape.split("x"))): shape for shape in shapes}


FLAT = _slices("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = _slices("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
BOARD = {n: f"1x1x{n}" for n in (1, 2, 4, 8)}  # GPUs of one host

# NVIDIA's data sheets; Google's pages of each TPU, and what libtpu says of itself. Memory is what
# the driver, or the TPU compiler's own limit, leaves to programs.
CHIPS = {
    c.name: c
    for c in (
        Chip(
            name="cpu", platform="cpu", memory_bytes=8 * GiB, bandwidth=25 * GB,
            flops={"float32": 0.1 * T, "bfloat16": 0.05 * T, "int8": 0.1 * T}, link=25 * GB,
            host_link=25 * GB, slices={n: f"{n}" for n in range(1, 17)}, one_host=16,
        ),
        Chip(
            name="h100", platform="cuda", memory_bytes=85_520_809_984, bandwidth=3.35 * TB,
            flops={
                "float32": 494 * T, "bfloat16": 989 * T, "float8_e4m3fn": 1979 * T,
                "int8": 1979 * T,
            },
            link=450 * GB, host_link=55 * GB, slices=BOARD, one_host=8,
        ),
        Chip(
            name="h200", platform="cuda", memory_bytes=151_397_597_184, bandwidth=4.8 * TB,
            flops={
                "float32": 494 * T, "bfloat16": 989 * T, "float8_e4m3fn": 1979 * T,
                "int8": 1979 * T,
            },
            link=450 * GB, host_link=55 * GB, slices=BOARD, one_host=8,
        ),
        Chip(
            name="b200", platform="cuda", memory_bytes=192_265_846_784, bandwidth=8 * TB,
            flops={
                "float32": 1125 * T, "bfloat16": 2250 * T, "float8_e4m3fn": 4500 * T,
                "int8": 4500 * T,
            },
            link=900 * GB, host_link=55 * GB, slices=BOARD, one_host=8,
            refused="its tensor cores (tcgen05) need kernels of their own, which xlinfer does not"
            " have; the Hopper kernels do not run there",
            planned_as="h200",
        ),
        Chip(
            name="v5e", platform="tpu", memory_bytes=int(15.75 * GiB), bandwidth=0.82 * TB,
            flops={"float32": 197 * T, "bfloat16": 197 * T, "int8": 394 * T}, link=200 * GB,
            host_link=20 * GB, per_host=4, slices=FLAT, one_host=8,
        ),
        Chip(
            name="v5p", platform="tpu", memory_bytes=int(95.74 * GiB), bandwidth=2.76 * TB,
            flops={"float32": 459 * T, "bfloat16": 459 * T, "int8": 918 * T}, link=600 * GB,
            host_link=40 * GB, per_host=4, slices=CUBE, one_host=4,
        ),
        Chip(
            name="v6e", platform="tpu", memory_bytes=int(31.25 * GiB), bandwidth=1.64 * TB,
            flops={
                "float32": 918 * T, "bfloat16": 918 * T, "int8": 1836 * T,
                "float8_e4m3fn": 918 * T,
            },
            link=400 * GB, host_link=40 * GB, per_host=4, slices=FLAT, one_host=8,
        ),
        Chip(
            name="tpu7x", platform="tpu", memory_bytes=int(94.75 * GiB), bandwidth=3.69 * TB,
            flops={"float32": 1155 * T, "bfloat16": 1155 * T, "float8_e4m3fn": 2307 * T},
            link=600 * GB, host_link=40 * GB, per_chip=2, per_host=4, slices=CUBE, one_host=4,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    chip: Chip
    chips: int

    @property
    def name(self) -> str:
        return self.chip.name if self.chips == 1 and not _is_tpu(self) else self.slice_name

    @property
    def slice_name(self) -> str:
        return f"{self.chip.name}-{self.chips}"

    @property
    def devices(self) -> int:
        return self.chips * self.chip.per_chip

    @property
    def hosts(self) -> int:
        return 1 if self.chips <= self.chip.one_host else self.chips // self.chip.per_host

    @property
    def shape(self) -> str:
        """Of the slice: "2x4"."""
        return self.chip.slices[self.chips]


def _is_tpu(target: Target) -> bool:
    return target.chip.platform == "tpu"


def parse_target(name: str) -> Target:
    """ "v6e-8": eight v6e chips; "h200": one. Raises TargetError naming what there is."""
    found = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+))?", name.strip())
    chip = CHIPS.get(found[1]) if found else None
    if found is None or chip is None:
        close = difflib.get_close_matches(name.partition("-")[0], CHIPS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise TargetError(f"target {name!r} is none of {', '.join(CHIPS)}, or local.{hint}")
    chips = int(found[2] or 1)
    if chips not in chip.slices:
        sizes = ", ".join(f"{chip.name}-{n}" for n in chip.slices)
        raise TargetError(f"target {name!r}: {chip.name} comes as {sizes}")
    return Target(chip=chip, chips=chips)


def larger(target: Target) -> tuple[Target, ...]:
    """The slices of the same chip with more of them, smallest first."""
    sizes = sorted(n for n in target.chip.slices if n > target.chips)
    return tuple(Target(chip=target.chip, chips=n) for n in sizes)
