"""Checkpoint, converted or not -> a module whose parameters lie where the mesh wants them.

Tensors are read in file order, moved as they are, and cast, transposed and written into their
place on the device, in place: the peak is the model, one tensor and what is in flight.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from converters import (
    AnyStep,
    Checkpoint,
    PackedStep,
    Rule,
    ScaleStep,
    Step,
    open_checkpoint,
    parameter_rules,
    weight_forms,
)
from converters.errors import listing
from converters.formats.packing import OnLoad
from pallas_kernels.devices import Device
from xlinfer import placing
from xlinfer.config import ModelConfig
from xlinfer.converted import is_converted, read_manifest, read_parameters
from xlinfer.forms import Form
from xlinfer.hub import fetch
from xlinfer.mesh import AnyMesh, device_of, make_mesh, replicate_kv_heads, sharding
from xlinfer.models import EncoderDecoder, Model, Transformer
from xlinfer.progress import Progress
from xlinfer.quant import QTensor
from xlinfer.quantize import axes_of, check_impl, held_as, quantize_model

logger = logging.getLogger(__name__)
IN_FLIGHT_BYTES = 1 << 30  # host memory between reading a tensor and its place on the device

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(jnp.float32),
    "float": np.dtype(jnp.float32),
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(jnp.float16),
    "half": np.dtype(jnp.float16),
}


def load_model(
    path: str | Path,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    quantization: str | None = None,
    matmul_impl: str | None = None,
    text_only: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    in_flight_bytes: int = IN_FLIGHT_BYTES,
) -> Model:
    """The model in the folder `path`, a Hugging Face checkpoint or one written by xlinfer.convert,
    or in the GGUF `path`; or of the repository `path` of the Hugging Face hub, "org/name", at
    `revision`, where nothing here has that name.

    Weights that the checkpoint has in few bits stay so. `quantization` int4, int8 or fp8 rounds
    the layers' matrices of one with float weights as each is read. `matmul_impl` is what
    multiplies by quantized weights; None is the best for weights and device.
    `dtype`: None or "auto" keeps the checkpoint's (float32 on CPU, whose bf16 products are slow);
    else float32, bfloat16 or float16, by name or as a dtype. `mesh`: see make_mesh; None is one
    device. With more devices than kv heads these are repeated, and `model.cfg` says so.
    `text_only`: of a model that reads images beside text, its text model alone; what is left out
    is logged. `progress("load", done, total)` counts bytes.

    Raises CheckpointError for a checkpoint that is malformed, not understood or does not fit its
    config, and ValueError for an unknown dtype or a mesh that does not divide the model.
    """
    path = fetch(path, revision, progress or _silent)
    checkpoint = open_checkpoint(path, text_only=text_only)
    mesh = make_mesh(1) if mesh is None else mesh
    config = replicate_kv_heads(checkpoint.config, mesh)
    kept = _dtype(dtype)
    if kept is None:
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        kept = DTYPES["float32"] if on_cpu else stored_dtype(checkpoint)
        if checkpoint.scheme is not None and kept == np.float32 and not on_cpu:
            kept = DTYPES["bfloat16"]  # there are no products of packed weights in 32 bits
    if quantization is not None and checkpoint.scheme is not None:
        raise ValueError(
            f"quantization={quantization}: {checkpoint.path} is quantized already "
            f"({checkpoint.scheme.name}); leave it out"
        )
    device = device_of(mesh)
    replicas = config.num_kv_heads // checkpoint.config.num_kv_heads
    if is_converted(checkpoint.path):
        model = abstract_model(config, kept, mesh, device)
        model = _restored(model, checkpoint, mesh, replicas, progress or _silent)
        if quantization is not None:
            quantize_model(model, quantization, device, matmul_impl)
        return model
    scheme = checkpoint.scheme if quantization is None else OnLoad(method=quantization)
    forms = weight_forms(checkpoint.config, scheme, str(checkpoint.path), replicas)
    model = abstract_model(config, kept, mesh, device, forms, matmul_impl)
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    targets = {path: param.get_value() for path, param in flat}
    _check_rules(parameter_rules(checkpoint.config, replicas), targets, config)
    steps = checkpoint.schedule(replicas, scheme)
    for prefix, tensors, nbytes in checkpoint.left_out:
        logger.warning("%s: left out %s: %d tensors, %d bytes", path, prefix, tensors, nbytes)
    _say_what_becomes_floats(checkpoint.path, steps, forms, kept)
    _tell_of_scales(checkpoint, steps)
    arrays = _stream(steps, targets, mesh, progress or _silent, in_flight_bytes)
    filled = [(path, param.replace(arrays[path])) for path, param in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def abstract_model(
    config: ModelConfig,
    dtype: Any,
    mesh: AnyMesh,
    device: Device,
    forms: Mapping[tuple, Form] | None = None,
    matmul_impl: str | None = None,
) -> Model:
    """The model without arrays: its parameters are ShapeDtypeStructs that say where each is to lie
    on `mesh`, which need not be here, in their `forms`. Raises ValueError where the mesh does not
    divide it."""
    check_impl(matmul_impl, device)
    kind = Transformer if config.encoder is None else EncoderDecoder
    make = lambda: kind(config, dtype=dtype, device=device, mesh=mesh, rngs=nnx.Rngs(0))
    graph, state = nnx.split(nnx.eval_shape(make))
    placed = []
    for path, param in nnx.to_flat_state(state):
        param = param.replace(_target(param.get_value(), axes_of(param), mesh))
        if forms and path in forms:
            param = param.replace(held_as(param, path, forms[path], device, matmul_impl))
        placed.append((path, param))
    return nnx.merge(graph, nnx.from_flat_state(placed))


def replica(model: Model, mesh: Mesh) -> Model:
    """A copy of `model` whose arrays lie on `mesh`, of the same axes, as they lie on its own."""
    graph, state = nnx.split(model)

    def put(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding)
        return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))

    copied = []
    for path, param in nnx.to_flat_state(state):
        value = jax.tree.map(put, param.get_value())
        if isinstance(value, QTensor) and value.mesh is not None:
            value = dataclasses.replace(value, mesh=mesh)
        copied.append((path, param.replace(value)))
    copy = nnx.merge(graph, nnx.from_flat_state(copied))
    for _, module in nnx.iter_modules(copy):
        if getattr(module, "mesh", None) is not None:
            setattr(module, "mesh", mesh)  # noqa: B010 -- a Module declares none
    return copy


def stored_dtype(checkpoint: Checkpoint) -> np.dtype:
    """The dtype that most of the checkpoint's float bytes have; float32 for float64."""
    if is_converted(checkpoint.path):
        return _named(read_manifest(checkpoint.path).dtype)
    sizes = Counter[np.dtype]()
    for step in checkpoint.schedule(compare_copies=False):
        if isinstance(step, Step):
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


def _target(abstract: jax.ShapeDtypeStruct, axes: tuple, mesh: AnyMesh) -> jax.ShapeDtypeStruct:
    lies = sharding(mesh, axes, abstract.shape)
    return jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=lies)


def check_table(config: ModelConfig) -> None:
    """Raise ValueError unless the family's table makes every parameter of the module once."""
    mesh = make_mesh(1, jax.devices("cpu"))
    model = abstract_model(config, DTYPES["float32"], mesh, device_of(mesh))
    targets = {path: p.get_value() for path, p in nnx.to_flat_state(nnx.state(model))}
    _check_rules(parameter_rules(config), targets, config)


def _check_rules(rules: tuple[Rule, ...], targets: Mapping, config: ModelConfig) -> None:
    """The family's table and the module agree on every parameter, each once."""
    made = Counter(rule.target for rule in rules)
    wrong = [path for path in {*made, *targets} if made[path] != 1 or path not in targets]
    floats = {path: t for path, t in targets.items() if not isinstance(t, QTensor)}
    wrong += [r.target for r in rules if r.target in floats and floats[r.target].shape != r.shape]
    if wrong:
        names = ", ".join(sorted(".".join(map(str, path)) for path in wrong))
        raise ValueError(f"the table of {config.model_type} does not fit the model at {names}")


def _say_what_becomes_floats(
    path: Path, steps: tuple[AnyStep, ...], forms: Mapping[tuple, Form], dtype: np.dtype
) -> None:
    """One line for each parameter that the checkpoint has in few bits and the model has not."""
    blocks = "its outputs are moved out of their blocks of 128"
    reasons = {
        step.rule.target: step.packing.why or blocks
        for step in steps
        if isinstance(step, PackedStep) and step.rule.target not in forms
    }
    for target, why in reasons.items():
        logger.warning("%s: %s is kept in %s: %s", path, ".".join(map(str, target)), dtype, why)


def _tell_of_scales(checkpoint: Checkpoint, steps: tuple[AnyStep, ...]) -> None:
    """What of its scales the file lacks, and what of them has no use."""
    if names := checkpoint.unused_scales:
        unused = listing(list(names))
        logger.warning("%s: left out %s: attention multiplies floats", checkpoint.path, unused)
    scales = [step for step in steps if isinstance(step, ScaleStep)]
    if absent := sum(step.tensor is None for step in scales):
        logger.warning(
            "%s: %d of %d scales of the KV cache are missing: they are 1.0", checkpoint.path,
            absent, len(scales),
        )  # fmt: skip


def _stream(
    steps: tuple[AnyStep, ...],
    targets: Mapping[tuple, Any],
    mesh: Mesh,
    progress: Progress,
    in_flight_bytes: int,
) -> dict[tuple, Any]:
    leaves, tree = jax.tree.flatten(targets)
    specs = tuple((t.shape, placing.while_loading(t.dtype, mesh), t.sharding) for t in leaves)
    arrays = jax.tree.unflatten(tree, placing.zeros(specs))
    total, done, in_flight = sum(step.nbytes for step in steps), 0, 0
    orders: placing.Orders = {}
    progress("load", 0, total)
    for step in steps:
        if in_flight and in_flight + step.nbytes > in_flight_bytes:
            jax.block_until_ready(arrays)  # each is the newest of its name: all writes are done
            in_flight = 0
        path = step.rule.target
        match step:
            case Step():
                lies = targets[path].sharding
                arrays[path] = placing.place(step, arrays[path], lies, mesh)
            case ScaleStep():
                arrays[path] = placing.place_scale(step, arrays[path], targets[path].sharding)
            case PackedStep():
                arrays[path] = placing.place_packed(step, arrays[path], targets[path], mesh, orders)
        in_flight += step.nbytes
        done += step.nbytes
        progress("load", done, total)
    return jax.block_until_ready(jax.tree.map(placing.loaded, arrays, targets))


def _restored(
    model: Transformer, checkpoint: Checkpoint, mesh: Mesh, replicas: int, progress: Progress
) -> Transformer:
    """The abstract model with the converted arrays, cast and placed. Where kv heads are to be
    repeated, those that the checkpoint has are read whole first; gates and ups that devices share
    are moved once they are there."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    targets = {path: param.get_value() for path, param in flat}
    axes = {path: axes_of(param) for path, param in flat}
    repeated = {p: names.index("kv_heads") for p, names in axes.items() if "kv_heads" in names}
    repeated, heads = repeated if replicas > 1 else {}, checkpoint.config.num_kv_heads
    asked = dict(targets)
    for path, axis in repeated.items():
        t = targets[path]
        shape = tuple(n // replicas if i == axis else n for i, n in enumerate(t.shape))
        whole = NamedSharding(t.sharding.mesh, jax.P())
        asked[path] = jax.ShapeDtypeStruct(shape, t.dtype, sharding=whole)
    total = sum(t.size * t.dtype.itemsize for t in asked.values())
    progress("load", 0, total)
    arrays = read_parameters(checkpoint.path, asked)
    for path, axis in repeated.items():
        t = targets[path]

        def repeat(x: jax.Array, axis=axis, shape=t.shape) -> jax.Array:
            by_head = x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])
            return by_head.repeat(replicas, axis=axis).reshape(shape)

        arrays[path] = jax.jit(repeat, out_shardings=t.sharding)(arrays[path])
    for rule in parameter_rules(checkpoint.config):
        if (halves := placing.halves_of(rule, mesh)) is not None:
            path = rule.target
            arrays[path] = placing.in_halves(arrays[path], halves, targets[path].sharding)
    jax.block_until_ready(arrays)
    progress("load", total, total)
    filled = [(path, param.replace(arrays[path])) for path, param in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))
