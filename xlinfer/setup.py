"""A model's config, a target and what the user says of the programs -> a deployment, for devices
that need not be here and weights that need not be there.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from converters import (
    CheckpointError,
    read_model,
    read_scheme,
    text_document,
    weight_forms,
)
from converters import read_config as read_folder
from converters.errors import read_object
from converters.formats.gguf import find_gguf
from converters.formats.packing import OnLoad
from pallas_kernels.devices import DEVICES, Device, device_of_kind
from xlinfer.config import ModelConfig
from xlinfer.deployment import Deployment, Facts, Sizes, deploy, facts_of
from xlinfer.forms import Form
from xlinfer.mesh import (
    default_expert_parallel_size,
    make_mesh,
    mesh_axes,
    replicate_kv_heads,
)
from xlinfer.target import CHIPS, Target, TargetError, parse_target
from xlinfer.topology import described_mesh
from xlinfer.weights import DTYPES, abstract_model

MESH_SIZES = ("tensor_parallel_size", "expert_parallel_size", "sequence_parallel_size")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that decides which programs there are; plain data, as JSON too."""

    config: Mapping[str, Any]  # config.json, or the text model's own
    target: str
    tensor_parallel_size: int
    expert_parallel_size: int
    sequence_parallel_size: int
    dtype: str
    quantization: str | None
    matmul_impl: str | None
    sizes: Sizes

    @property
    def axes(self) -> dict[str, int]:
        """Of the mesh of one replica."""
        return mesh_axes(*(getattr(self, name) for name in MESH_SIZES))

    @property
    def devices(self) -> int:
        """Of one replica."""
        return math.prod(self.axes.values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Setup":
        given: dict[str, Any] = {**value, "sizes": Sizes(**value["sizes"])}
        return cls(**given)


def read_config(model: str | Path, *, text_only: bool) -> Mapping[str, Any]:
    """config.json of the folder `model`, or that file itself, or what a GGUF amounts to; with
    `text_only` its text model's. Raises CheckpointError."""
    path = Path(model).expanduser()
    if path.exists() and find_gguf(path) is not None:
        return read_folder(path)
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"--model={model}: there is no folder with a config.json, nor such a file"
        )
    document = read_folder(path) if path.is_dir() else read_object(file)
    return text_document(file, document) if text_only else document


def dtype_of(config: Mapping[str, Any], asked: str, target: Target) -> str:
    """The weights' dtype: as asked; "auto": the checkpoint's own, float32 on CPU."""
    if asked != "auto":
        if asked not in DTYPES:
            raise ValueError(f"dtype {asked!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[asked].name
    own = config.get("dtype") or config.get("torch_dtype") or "float32"
    if target.chip.platform == "cpu":
        return "float32"
    if own == "float32" and read_scheme("config.json", config) is not None:
        return "bfloat16"  # there are no products of packed weights in 32 bits
    if own not in DTYPES:
        raise CheckpointError(
            f"config.json: dtype {own!r} is not one of {', '.join(DTYPES)}; name a --dtype"
        )
    return DTYPES[own].name


def device_for(target: Target) -> Device:
    """What kernels know of the target's chip. Raises TargetError where there are none for it."""
    if target.chip.refused:
        raise TargetError(f"{target.name}: nothing is compiled for it: {target.chip.refused}")
    return DEVICES[target.chip.name]


def planned_device(target: Target) -> Device:
    """`device_for`, or for a chip that nothing is compiled for the one that it is planned as."""
    return DEVICES[target.chip.planned_as] if target.chip.refused else device_for(target)


def find_target(name: str) -> Target:
    """parse_target's, or with "local" what is here. Raises TargetError."""
    return local_target() if name.strip() == "local" else parse_target(name)


def local_target() -> Target:
    """jax's devices. A CPU's memory is the host's, divided among as many devices as jax was told
    to make of it. Raises TargetError for a chip that has no kernels."""
    devices = jax.devices()
    try:
        chip = CHIPS[device_of_kind(devices[0].device_kind).name]
    except ValueError as error:
        raise TargetError(f"target 'local': {error}") from None
    if chip.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        chip = replace(chip, memory_bytes=memory // len(devices))
    return Target(chip=chip, chips=max(1, len(devices) // chip.per_chip))


def setup(
    model: str | Path,
    target: str,
    *,
    text_only: bool,
    tensor_parallel_size: int | None,
    expert_parallel_size: int | None = None,
    sequence_parallel_size: int = 1,
    dtype: str,
    quantization: str | None,
    matmul_impl: str | None,
    sizes: Sizes,
) -> Setup:
    """`tensor_parallel_size` None: all devices of the target; `expert_parallel_size` None: the most
    that divides experts and devices. Raises CheckpointError, TargetError or ValueError for what
    does not exist or fit."""
    found, config = find_target(target), read_config(model, text_only=text_only)
    if matmul_impl is not None and quantization is None and read_scheme("", config) is None:
        raise ValueError(
            f"matmul_impl={matmul_impl} chooses how quantized weights are multiplied, and there "
            "are none: name a quantization too, or leave it out"
        )
    wanted = tensor_parallel_size or max(1, found.devices // sequence_parallel_size)
    if found.devices % (wanted * sequence_parallel_size):
        times = f" x sequence_parallel_size={sequence_parallel_size}"
        raise TargetError(
            f"tensor_parallel_size={wanted}{times if sequence_parallel_size > 1 else ''} does not "
            f"divide the {found.devices} devices of {found.name}"
        )
    if expert_parallel_size is None:
        read = read_model(Path("config.json"), config)
        expert_parallel_size = default_expert_parallel_size(read, wanted)
    return Setup(
        config=config, target=found.name, tensor_parallel_size=wanted,
        expert_parallel_size=expert_parallel_size, sequence_parallel_size=sequence_parallel_size,
        dtype=dtype_of(config, dtype, found), quantization=quantization, matmul_impl=matmul_impl,
        sizes=sizes,
    )  # fmt: skip


def model_config(setup: Setup) -> ModelConfig:
    config = read_model(Path("config.json"), setup.config)
    return replicate_kv_heads(config, _no_devices(setup))


def _no_devices(setup: Setup) -> AbstractMesh:
    axes = setup.axes
    types = (AxisType.Auto,) * len(axes)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=types)


def _forms(setup: Setup) -> dict[tuple, Form]:
    """Of the weights that are kept in few bits: the checkpoint's, or what `quantization` makes of
    float ones."""
    scheme = read_scheme("config.json", setup.config)
    if setup.quantization is not None:
        if scheme is not None:
            raise CheckpointError(
                f"quantization={setup.quantization}: the checkpoint is quantized already "
                f"({scheme.name}); leave it out"
            )
        scheme = OnLoad(method=setup.quantization)
    own = read_model(Path("config.json"), setup.config)
    replicas = model_config(setup).num_kv_heads // own.num_kv_heads
    return weight_forms(own, scheme, "config.json", replicas)


def mesh_for(setup: Setup) -> jax.sharding.Mesh:
    """Of one replica: where the target has more devices, the others run the same executables."""
    target = parse_target(setup.target)
    if target.chip.platform == "cpu":
        return cpu_mesh(setup)
    return described_mesh(
        device_for(target), setup.axes, slice_shape=target.shape, one_host=target.hosts == 1
    )


def cpu_mesh(setup: Setup) -> jax.sharding.Mesh:
    return make_mesh(
        setup.tensor_parallel_size, jax.devices("cpu"),
        expert_parallel_size=setup.expert_parallel_size,
        sequence_parallel_size=setup.sequence_parallel_size,
    )  # fmt: skip


class Shapes(NamedTuple):
    """All of a deployment that its sizes do not change."""

    graph: nnx.GraphDef
    state: Any
    facts: Facts
    mesh: Any  # jax's Mesh, or an AbstractMesh
    device: Device
    target: Target


def shapes_for(setup: Setup, *, planned_for: Target | None = None) -> Shapes:
    """Raises ValueError when something does not go together.

    `planned_for`: the target itself, of which only numbers are wanted. Its mesh then is one of no
    devices, described or not, so that no compiler need be here; nothing can be compiled for it.
    """
    target = planned_for or parse_target(setup.target)
    if planned_for is None:
        device, mesh = device_for(target), mesh_for(setup)
    else:
        device, mesh = planned_device(target), _no_devices(setup)
    model = abstract_model(
        model_config(setup), DTYPES[setup.dtype], mesh, device, _forms(setup), setup.matmul_impl
    )
    graph, state = nnx.split(model)
    return Shapes(graph, state, facts_of(model), mesh, device, target)


def deployment_of(shapes: Shapes, sizes: Sizes) -> Deployment:
    """Raises PlanError when it does not fit."""
    return deploy(
        shapes.graph, shapes.state, shapes.facts, mesh=shapes.mesh, device=shapes.device,
        device_bytes=shapes.target.chip.memory_bytes, sizes=sizes,
        described=shapes.target.chip.platform != "cpu",
    )  # fmt: skip


def deployment_for(setup: Setup) -> Deployment:
    """Raises PlanError when it does not fit, ValueError when something does not go together."""
    return deployment_of(shapes_for(setup), setup.sizes)


def with_sizes(setup: Setup, **changes: Any) -> Setup:
    return replace(setup, sizes=replace(setup.sizes, **changes))
