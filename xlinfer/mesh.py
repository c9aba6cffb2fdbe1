"""Devices, and which axes of an array are spread over them: one table for all arrays.

A mesh has three axes. `expert` and `tensor` together share each layer: attention's heads, an MLP's
ffw and the vocabulary are split over both, experts over `expert`, and what is inside an expert over
`tensor`. Weights are whole along `sequence`, which splits the tokens of a step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.devices import Device, device_of_kind
from xlinfer.config import ModelConfig

AnyMesh = Mesh | AbstractMesh  # of devices, or of none: what is only counted needs none
SEQUENCE, EXPERT, TENSOR = "sequence", "expert", "tensor"
MODEL = (EXPERT, TENSOR)
WHOLE = ()
# Logical axis -> mesh axes; WHOLE stands whole on every device.
RULES: Mapping[str, tuple[str, ...]] = {
    "heads": MODEL,
    "kv_heads": MODEL,
    "ffw": MODEL,
    "vocab": MODEL,
    "experts": (EXPERT,),
    "expert_ffw": (TENSOR,),
    "tokens": (SEQUENCE,),
    "routes": WHOLE,
    "rank": WHOLE,
    "positions": WHOLE,
    "buckets": WHOLE,
    "hidden": WHOLE,
    "head_dim": WHOLE,
    "layers": WHOLE,
}
# Axes that stand whole where the devices do not divide them; any other such axis is an error.
WHOLE_IF_UNEVEN = frozenset({"vocab", "tokens"})


def mesh_axes(
    tensor_parallel_size: int,
    expert_parallel_size: int | None = None,
    sequence_parallel_size: int = 1,
) -> dict[str, int]:
    """The axes of a mesh by size. `tensor_parallel_size` devices share each layer; of them
    `expert_parallel_size` (None: all) have experts of their own, and the others share those. That
    many again for each of the `sequence_parallel_size` parts of a step's tokens.

    Raises ValueError for what is no positive integer or does not divide.
    """
    given = {
        "tensor_parallel_size": tensor_parallel_size,
        "expert_parallel_size": expert_parallel_size,
        "sequence_parallel_size": sequence_parallel_size,
    }
    for name, size in given.items():
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"{name} must be an integer, not {size!r}")
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    experts = tensor_parallel_size if expert_parallel_size is None else expert_parallel_size
    if tensor_parallel_size % experts:
        raise ValueError(
            f"expert_parallel_size is {experts}; it must divide tensor_parallel_size, "
            f"{tensor_parallel_size}, whose devices it is some of"
        )
    return {
        SEQUENCE: sequence_parallel_size,
        EXPERT: experts,
        TENSOR: tensor_parallel_size // experts,
    }


def make_mesh(
    tensor_parallel_size: int,
    devices: Sequence[Any] | None = None,
    *,
    expert_parallel_size: int | None = None,
    sequence_parallel_size: int = 1,
) -> Mesh:
    """A mesh of `mesh_axes` over as many of `devices`, jax's own where None.

    Raises ValueError when there are fewer.
    """
    axes = mesh_axes(tensor_parallel_size, expert_parallel_size, sequence_parallel_size)
    present = list(jax.devices() if devices is None else devices)
    needed = math.prod(axes.values())
    if needed > len(present):
        kind = present[0].platform if present else "any kind"
        times = f" x sequence_parallel_size {sequence_parallel_size}"
        raise ValueError(
            f"tensor_parallel_size is {tensor_parallel_size}"
            f"{times if sequence_parallel_size > 1 else ''}, but there are {len(present)} devices "
            f"({kind})"
        )
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=present[:needed])


def default_expert_parallel_size(config: ModelConfig, tensor_parallel_size: int) -> int:
    """The most that divides both the experts and the devices; 1 where there are no experts."""
    experts = 1 if config.moe is None else config.moe.num_experts
    return math.gcd(experts, tensor_parallel_size)


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


def on_mesh(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`host`, which is the same in every process of the mesh, where `sharding` says. A process
    moves what its own devices hold and asks the others nothing: `device_put` would have them
    compare all of it."""
    if sharding.is_fully_addressable:
        return jax.device_put(host, sharding)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def sharding(mesh: AnyMesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """How an array of `shape` whose axes are named `axes` lies on `mesh`; None is never split.

    A vocabulary that the devices do not divide stands whole on each. Raises ValueError for an
    unknown axis, and for any other axis that does not divide.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(shape)} axes of sizes {tuple(shape)}, but {len(axes)} names {axes}")
    parts = [split(mesh, axis, size) for axis, size in zip(axes, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*parts))


Part = str | tuple[str, ...] | None  # an entry of a PartitionSpec


def split(mesh: AnyMesh, axis: str | None, size: int | None = None) -> Part:
    """The mesh axes that a logical axis of `size` (None: one that divides) is split over. Mesh axes
    of one device, and those that a mesh of another making lacks, split nothing."""
    if axis is None:
        return None
    if axis not in RULES:
        raise ValueError(f"no sharding rule for the axis {axis!r}; mesh.RULES has {list(RULES)}")
    names = tuple(name for name in RULES[axis] if dict(mesh.shape).get(name, 1) > 1)
    devices = ways(mesh, axis)
    if size is not None and size % devices:
        if axis in WHOLE_IF_UNEVEN:
            return None
        raise ValueError(
            f"the axis {axis!r} of size {size} does not divide among {devices} devices"
        )
    return names if len(names) > 1 else next(iter(names), None)


def ways(mesh: AnyMesh, axis: str) -> int:
    """Among how many devices RULES split a logical axis."""
    return math.prod(dict(mesh.shape).get(name, 1) for name in RULES[axis])


def by_head(mesh: AnyMesh, *, before: int) -> PartitionSpec:
    """Of an array whose heads come after `before` axes."""
    return PartitionSpec(*[None] * before, split(mesh, "heads"))


def replicate_kv_heads(config: ModelConfig, mesh: AnyMesh) -> ModelConfig:
    """The config as the devices of `mesh` run it: there are at least as many kv heads as devices
    that share the heads.

    With fewer, each kv head is repeated, next to itself, so that every device holds one copy and
    query heads keep their kv head. Raises ValueError when heads, kv heads, experts or ffw sizes do
    not divide among the devices, or an encoder-decoder's tokens are to be split.
    """
    n, experts = ways(mesh, "heads"), ways(mesh, "experts")
    if ways(mesh, "tokens") > 1 and config.encoder is not None:
        raise ValueError(
            f"sequence_parallel_size {ways(mesh, 'tokens')}: the steps of encoder-decoder models "
            f"({config.model_type}) are not split; leave it out"
        )
    if faults := _faults(config, n):
        fits = [size for size in range(1, n) if _faults(config, size) == []]
        raise ValueError(
            f"tensor_parallel_size {n} does not fit this model: {'; '.join(faults)}. "
            f"Below it fit: {', '.join(map(str, fits))}"
        )
    if faults := _expert_faults(config, n, experts):
        sizes = (size for size in range(1, n + 1) if n % size == 0)
        fits = [size for size in sizes if not _expert_faults(config, n, size)]
        raise ValueError(
            f"expert_parallel_size {experts} of tensor_parallel_size {n} does not fit this model: "
            f"{'; '.join(faults)}. "
            + (f"These fit: {', '.join(map(str, fits))}" if fits else "None does")
        )
    kv = config.num_kv_heads
    return replace(config, num_kv_heads=math.lcm(kv, n)) if kv < n else config


def _faults(config: ModelConfig, n: int) -> list[str]:
    kv, moe = config.num_kv_heads, config.moe
    divided: list[tuple[int, str]] = [(config.num_heads, "attention heads are")]
    if any(not kind.experts for kind in config.kinds):
        divided.append((config.intermediate_size, "(intermediate_size) is"))
    if moe is not None and moe.shared_intermediate_size is not None:
        divided.append((moe.shared_intermediate_size, "(the shared expert's size) is"))
    return [
        *(f"{size} {what} not a multiple of it" for size, what in divided if size % n),
        *(
            [f"{kv} kv heads neither divide it nor are a multiple of it"]
            if kv % n and n % kv
            else []
        ),
    ]


def _expert_faults(config: ModelConfig, n: int, experts: int) -> list[str]:
    """Of `experts` of n devices that have experts of their own."""
    if config.moe is None:
        return []
    found, each, inside = [], config.moe.num_experts, config.moe.intermediate_size
    if each % experts:
        found.append(f"{each} experts are not a multiple of it")
    if inside % (n // experts):
        found.append(f"{inside} (an expert's size) is not a multiple of the {n // experts} devices")
    return found
