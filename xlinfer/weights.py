"""Checkpoint, converted or not -> a Transformer whose parameters lie where the mesh wants them.

Tensors are read in file order, moved as they are, and cast, transposed and written into their
place on the device, in place: the peak is the model, one tensor and what is in flight.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from converters import (
    Checkpoint,
    Layout,
    Rule,
    Step,
    cut_out,
    open_checkpoint,
    parameter_rules,
    read_tensor,
)
from pallas_kernels.devices import Device
from xlinfer.config import ModelConfig
from xlinfer.converted import is_converted, read_manifest, read_parameters
from xlinfer.mesh import TENSOR, device_of, make_mesh, replicate_kv_heads, sharding
from xlinfer.models import Transformer
from xlinfer.progress import Progress

IN_FLIGHT_BYTES = 1 << 30  # host memory between reading a tensor and its place on the device

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(jnp.float32),
    "float": np.dtype(jnp.float32),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(jnp.float16),
    "half": np.dtype(jnp.float16),
}
# The letters of converters.rules -> logical axes of mesh.RULES.
AXES: Mapping[str, str | None] = {
    "D": "hidden",
    "F": "ffw",
    "N": "heads",
    "K": "kv_heads",
    "H": "head_dim",
    "V": "vocab",
    "1": None,
    "E": "experts",
    "R": "routes",
    "P": "expert_ffw",
    "I": "expert_ffw",
    "S": "ffw",
    "M": "positions",
}


def load_model(
    path: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    in_flight_bytes: int = IN_FLIGHT_BYTES,
) -> Transformer:
    """The model in the folder `path`, a Hugging Face checkpoint or one written by xlinfer.convert.

    `dtype`: None or "auto" keeps the checkpoint's (float32 on CPU, whose bf16 products are slow);
    else float32, bfloat16 or float16, by name or as a dtype. `mesh`: see make_mesh; None is one
    device. With more devices than kv heads these are repeated, and `model.cfg` says so.
    `progress("load", done, total)` counts bytes.

    Raises CheckpointError for a checkpoint that is malformed, not understood or does not fit its
    config, and ValueError for an unknown dtype or a mesh that does not divide the model.
    """
    checkpoint = open_checkpoint(path)
    mesh = make_mesh(1) if mesh is None else mesh
    config = replicate_kv_heads(checkpoint.config, mesh.shape.get(TENSOR, 1))
    kept = _dtype(dtype)
    if kept is None:
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        kept = DTYPES["float32"] if on_cpu else stored_dtype(checkpoint)
    graph, state = nnx.split(abstract_model(config, kept, mesh, device_of(mesh)))
    flat = nnx.to_flat_state(state)
    axes = {path: _axes(param, path) for path, param in flat}
    targets = {path: param.get_value() for path, param in flat}
    replicas = config.num_kv_heads // checkpoint.config.num_kv_heads
    if is_converted(checkpoint.path):
        kv_axis = {
            path: names.index("kv_heads") for path, names in axes.items() if "kv_heads" in names
        }
        heads = checkpoint.config.num_kv_heads
        arrays = _restore(checkpoint.path, targets, kv_axis, heads, replicas, progress or _silent)
    else:
        _check_rules(parameter_rules(checkpoint.config, replicas), targets, config)
        steps = checkpoint.schedule(replicas)
        arrays = _stream(steps, targets, mesh, progress or _silent, in_flight_bytes)
    filled = [(path, param.replace(arrays[path])) for path, param in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def abstract_model(config: ModelConfig, dtype: Any, mesh: Mesh, device: Device) -> Transformer:
    """The model without arrays: its parameters are ShapeDtypeStructs that say where each is to lie
    on `mesh`, which need not be here. Raises ValueError where the mesh does not divide it."""
    make = lambda: Transformer(config, dtype=dtype, device=device, mesh=mesh, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    placed = [
        (path, param.replace(_target(param.get_value(), _axes(param, path), mesh)))
        for path, param in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def stored_dtype(checkpoint: Checkpoint) -> np.dtype:
    """The dtype that most of the checkpoint's bytes have; float32 for float64."""
    if is_converted(checkpoint.path):
        return _named(read_manifest(checkpoint.path).dtype)
    sizes = Counter[np.dtype]()
    for step in checkpoint.schedule():
        sizes[step.tensor.dtype] += step.nbytes
    dtype = sizes.most_common(1)[0][0]
    return DTYPES["float32"] if dtype == np.float64 else dtype


def _dtype(asked: Any) -> np.dtype | None:
    if asked is None or (isinstance(asked, str) and asked == "auto"):
        return None
    try:
        return _named(asked if isinstance(asked, str) else np.dtype(asked).name)
    except TypeError:
        raise ValueError(f"dtype {asked!r} is not one of auto, {', '.join(DTYPES)}") from None


def _named(name: str) -> np.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _silent(phase: str, done: int, total: int) -> None:
    pass


def _axes(param: nnx.Variable, path: tuple) -> tuple[str | None, ...]:
    """The logical axes of a whole parameter: its own metadata does not know that it is stacked."""
    axes = tuple(param.get_metadata("logical_axes"))
    return ("layers", *axes) if path[0] == "layers" else axes


def _target(abstract: jax.ShapeDtypeStruct, axes: tuple, mesh: Mesh) -> jax.ShapeDtypeStruct:
    lies = sharding(mesh, axes, abstract.shape)
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=lies)


def _check_rules(rules: tuple[Rule, ...], targets: Mapping, config: ModelConfig) -> None:
    """The family's table and the module agree on every parameter, each once."""
    made = Counter(rule.target for rule in rules)
    wrong = [path for path in {*made, *targets} if made[path] != 1 or path not in targets]
    wrong += [r.target for r in rules if r.target in targets and targets[r.target].shape != r.shape]
    if wrong:
        names = ", ".join(sorted(".".join(path) for path in wrong))
        raise ValueError(f"the table of {config.model_type} does not fit the model at {names}")


def _stream(
    steps: tuple[Step, ...],
    targets: Mapping[tuple, jax.ShapeDtypeStruct],
    mesh: Mesh,
    progress: Progress,
    in_flight_bytes: int,
) -> dict[tuple, jax.Array]:
    specs = tuple((t.shape, t.dtype, t.sharding) for t in targets.values())
    arrays = dict(zip(targets, _zeros(specs), strict=True))
    total, done, in_flight = sum(step.nbytes for step in steps), 0, 0
    progress("load", 0, total)
    for step in steps:
        if in_flight and in_flight + step.nbytes > in_flight_bytes:
            jax.block_until_ready(arrays)  # each is the newest of its name: all writes are done
            in_flight = 0
        path, layout = step.rule.target, step.rule.layout
        host = cut_out(read_tensor(step.tensor), step.rule)
        if host.dtype == np.float64:  # jax has no such arrays by default
            host = host.astype(np.float32)
        moved = jax.device_put(host, _source_sharding(layout, mesh))
        arrays[path] = _write(
            arrays[path], moved, np.array(step.start, np.int32), layout, targets[path].sharding
        )
        in_flight += step.nbytes
        done += step.nbytes
        progress("load", done, total)
    return jax.block_until_ready(arrays)


@partial(jax.jit, static_argnames="specs")
def _zeros(specs: tuple[tuple[tuple[int, ...], np.dtype, NamedSharding], ...]) -> list[jax.Array]:
    """One program for all parameters, so that start-up compiles little."""
    return [
        jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), lies)
        for shape, dtype, lies in specs
    ]


def _source_sharding(layout: Layout, mesh: Mesh) -> NamedSharding:
    """The source split as its target will be: a group of axes by its first letter. Kv heads that
    get repeated are fewer than the devices and come whole."""
    size = dict(zip((a for group in layout.source_axes for a in group), layout.sizes, strict=True))
    first = [group[0] for group in layout.source_axes]
    whole = "K" if layout.kv_replicas > 1 else ""
    axes = [None if letter in whole else AXES[letter] for letter in first]
    return sharding(mesh, axes, [size[letter] for letter in first])


@partial(jax.jit, static_argnames=("layout", "lies"), donate_argnames="parameter")
def _write(
    parameter: jax.Array, tensor: jax.Array, start: jax.Array, layout: Layout, lies: NamedSharding
) -> jax.Array:
    """`tensor` in its place in `parameter`, which it reuses; one program per layout and dtype."""
    letters = [letter for group in layout.source_axes for letter in group]
    order = [letter for group in layout.target_axes for letter in group]
    value = tensor.astype(parameter.dtype).reshape(layout.sizes)
    value = value.transpose([letters.index(letter) for letter in order])
    if layout.kv_replicas > 1 and "K" in order:
        value = value.repeat(layout.kv_replicas, axis=order.index("K"))
    at = [start[axis] for axis in range(parameter.ndim)]
    written = jax.lax.dynamic_update_slice(parameter, value.reshape(layout.slot), at)
    return jax.lax.with_sharding_constraint(written, lies)


def _restore(
    folder: Path,
    targets: Mapping[tuple, jax.ShapeDtypeStruct],
    kv_axis: Mapping[tuple, int],
    heads: int,
    replicas: int,
    progress: Progress,
) -> dict[tuple, jax.Array]:
    """The converted arrays, cast and placed. Where kv heads are to be repeated, the `heads` that
    it has are read whole first."""
    repeated = dict(kv_axis) if replicas > 1 else {}
    asked = dict(targets)
    for path, axis in repeated.items():
        t = targets[path]
        shape = tuple(n // replicas if i == axis else n for i, n in enumerate(t.shape))
        whole = NamedSharding(t.sharding.mesh, jax.P())
        asked[path] = jax.ShapeDtypeStruct(shape, t.dtype, sharding=whole)
    total = sum(t.size * t.dtype.itemsize for t in asked.values())
    progress("load", 0, total)
    arrays = read_parameters(folder, asked)
    for path, axis in repeated.items():
        t = targets[path]

        def repeat(x: jax.Array, axis=axis, shape=t.shape) -> jax.Array:
            by_head = x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])
            return by_head.repeat(replicas, axis=axis).reshape(shape)

        arrays[path] = jax.jit(repeat, out_shardings=t.sharding)(arrays[path])
    jax.block_until_ready(arrays)
    progress("load", total, total)
    return arrays
