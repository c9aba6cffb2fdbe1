"""Devices, and which axis of a weight is spread over them: one table for all weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.devices import Device, device_of_kind
from xlinfer.config import ModelConfig

AnyMesh = Mesh | AbstractMesh
TENSOR = "tensor"
# Logical axis -> mesh axis; None stands whole on every device.
RULES: Mapping[str, str | None] = {
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "ffw": TENSOR,
    "vocab": TENSOR,
    "experts": TENSOR,
    "expert_ffw": None,
    "routes": None,
    "rank": None,
    "positions": None,
    "buckets": None,
    "hidden": None,
    "head_dim": None,
    "layers": None,
}
# Axes that stand whole where the devices do not divide them; any other such axis is an error.
WHOLE_IF_UNEVEN = frozenset({"vocab"})


def make_mesh(tensor_parallel_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, "tensor", over that many of `devices`, jax's own where None.

    Raises ValueError when there are fewer.
    """
    if isinstance(tensor_parallel_size, bool) or not isinstance(tensor_parallel_size, int):
        raise ValueError(f"tensor_parallel_size must be an integer, not {tensor_parallel_size!r}")
    if tensor_parallel_size < 1:
        raise ValueError(f"tensor_parallel_size is {tensor_parallel_size}; it must be at least 1")
    present = list(jax.devices() if devices is None else devices)
    if tensor_parallel_size > len(present):
        kind = present[0].platform if present else "any kind"
        raise ValueError(
            f"tensor_parallel_size is {tensor_parallel_size}, but there are {len(present)} devices "
            f"({kind})"
        )
    used = present[:tensor_parallel_size]
    return jax.make_mesh((tensor_parallel_size,), (TENSOR,), (AxisType.Auto,), devices=used)


def replica_meshes(mesh: Mesh, count: int, devices: Sequence[Any] | None = None) -> list[Mesh]:
    """`mesh`, which is of the first of `devices` (jax's own where None), and like it of the next
    ones, `count` in all. Raises ValueError when there are fewer devices."""
    present = list(jax.devices() if devices is None else devices)
    if count < 1 or count * mesh.size > len(present):
        raise ValueError(
            f"data_parallel_size is {count}: of {len(present)} devices with {mesh.size} for each "
            f"replica it is from 1 to {len(present) // mesh.size}"
        )
    parts = [present[i * mesh.size : (i + 1) * mesh.size] for i in range(count)]
    like = lambda part: Mesh(
        np.array(part).reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types
    )
    return [mesh, *map(like, parts[1:])]


def device_of(mesh: Mesh) -> Device:
    """What kernels are chosen and tuned for. Raises ValueError for a chip that none knows."""
    return device_of_kind(mesh.devices.flat[0].device_kind)


def sharding(mesh: AnyMesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """How an array of `shape` whose axes are named `axes` lies on `mesh`; None is never split.

    A vocabulary that the devices do not divide stands whole on each. Raises ValueError for an
    unknown axis, and for any other axis that does not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(shape)} axes of sizes {tuple(shape)}, but {len(axes)} names {axes}")
    return NamedSharding(
        mesh, PartitionSpec(*(_mesh_axis(mesh, *pair) for pair in zip(axes, shape, strict=True)))
    )


def _mesh_axis(mesh: AnyMesh, axis: str | None, size: int) -> str | None:
    if axis is None:
        return None
    if axis not in RULES:
        raise ValueError(f"no sharding rule for the axis {axis!r}; mesh.RULES has {list(RULES)}")
    name = RULES[axis]
    if name is None or name not in mesh.shape:
        return None
    if size % mesh.shape[name] == 0:
        return name
    if axis in WHOLE_IF_UNEVEN:
        return None
    raise ValueError(
        f"the axis {axis!r} of size {size} does not divide among {mesh.shape[name]} devices"
    )


def replicate_kv_heads(config: ModelConfig, n: int) -> ModelConfig:
    """The config as `n` tensor-parallel devices run it: `num_kv_heads` is at least n.

    With fewer, each kv head is repeated n / num_kv_heads times, next to itself, so that every
    device holds one copy and query heads keep their kv head. Raises ValueError when heads, kv
    heads, experts or the ffw size do not divide among n devices.
    """
    fits = [size for size in range(1, n) if _faults(config, size) == []]
    faults, kv = _faults(config, n), config.num_kv_heads
    if faults:
        raise ValueError(
            f"tensor_parallel_size {n} does not fit this model: {'; '.join(faults)}. "
            f"Below it fit: {', '.join(map(str, fits))}"
        )
    return replace(config, num_kv_heads=math.lcm(kv, n)) if kv < n else config


def _faults(config: ModelConfig, n: int) -> list[str]:
    kv, moe = config.num_kv_heads, config.moe
    divided: list[tuple[int, str]] = [(config.num_heads, "attention heads are")]
    if any(not kind.experts for kind in config.kinds):
        divided.append((config.intermediate_size, "(intermediate_size) is"))
    if moe is not None:
        divided.append((moe.num_experts, "experts are"))
        if moe.shared_intermediate_size is not None:
            divided.append((moe.shared_intermediate_size, "(the shared expert's size) is"))
    return [
        *(f"{size} {what} not a multiple of it" for size, what in divided if size % n),
        *(
            [f"{kv} kv heads neither divide it nor are a multiple of it"]
            if kv % n and n % kv
            else []
        ),
    ]
