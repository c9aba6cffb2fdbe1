"""Tensors of a checkpoint into their places among the parameters, on the device.

A tensor is moved as it is; the programs here cast, unpack and transpose it and write it into the
parameter, whose buffer they reuse.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from converters import (
    CheckpointError,
    Cut,
    Layout,
    PackedStep,
    Rule,
    ScaleStep,
    Step,
    cut_out,
    read_tensor,
)
from converters.formats.packing import Round
from converters.packed import EXPERTS, IN, OUT, WHOLE, array_rule
from converters.rules import STACKED
from pallas_kernels.devices import DEVICES
from xlinfer.forms import FP8_BLOCK, Form
from xlinfer.mesh import on_mesh, sharding, split, ways
from xlinfer.quant import ARRAYS, QTensor, array_axes, dequantize
from xlinfer.quantize import ROUNDED
from xlinfer.unpack import Unpacked, unpack

Orders = dict[tuple, tuple[str, np.ndarray]]
Held = dict[str, jax.Array]  # the arrays of a QTensor, by name
Way = tuple[Layout, Cut | None]  # from a source to its place


class Halves(NamedTuple):
    """An axis of gates and then of ups, whose `devices` each want their own part of both: it holds
    the first device's gates, its ups, then the second's, and so on."""

    axis: int
    devices: int


# The letters of converters.rules -> logical axes of mesh.RULES.
AXES: Mapping[str, str | None] = {
    "D": "hidden",
    "F": "ffw",
    "N": "heads",
    "K": "kv_heads",
    "X": "heads",
    "G": None,
    "H": "head_dim",
    "V": "vocab",
    "1": None,
    "E": "experts",
    "R": "routes",
    "P": None,
    "I": "expert_ffw",
    "S": "ffw",
    "M": "positions",
    "B": "buckets",
    "Q": "rank",
    "C": "rank",
    "L": "rank",
    "U": "head_dim",
    "W": "head_dim",
}


@partial(jax.jit, static_argnames="specs")
def zeros(specs: tuple[tuple[tuple[int, ...], np.dtype, NamedSharding], ...]) -> list[jax.Array]:
    """One program for all parameters, so that start-up compiles little."""
    return [
        jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), lies)
        for shape, dtype, lies in specs
    ]


def while_loading(dtype: np.dtype, mesh: Mesh) -> np.dtype:
    """What a parameter of `dtype` is until its last tensor is there. XLA's CPU backend widens all
    of a 4-bit array for every update of a part: 23 ns a number of the stack, of which int8 is
    updated in place (docs/LOG.md). GPUs and TPUs update 4 bits in place."""
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return np.dtype(np.int8) if is_cpu and dtype.name in ("int4", "uint4") else dtype


def loaded(array: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
    """`array`, which is used up, in the dtype that it is to have."""
    if array.dtype == target.dtype:
        return array
    here = [(np.asarray(shard.data), shard.device) for shard in array.addressable_shards]
    lies = array.sharding
    array.delete()
    cast = [jax.device_put(x.astype(target.dtype), device) for x, device in here]
    return jax.make_array_from_single_device_arrays(target.shape, lies, cast)


class Write(NamedTuple):
    """A program of this module and what it is called with, the parameter's arrays first: it uses
    them up and gives them back with a tensor in its place."""

    program: Any
    arguments: tuple

    def run(self) -> Any:
        return self.program(*self.arguments)


Move = Callable[[np.ndarray, NamedSharding], Any]  # from the host to the devices


def place(step: Step, parameter: jax.Array, lies: NamedSharding, mesh: Mesh) -> jax.Array:
    """`parameter` with the step's tensor in it; `parameter` itself is used up."""
    return write(step, parameter, lies, mesh, on_mesh).run()


def write(step: Step, parameter: Any, lies: NamedSharding, mesh: Mesh, move: Move) -> Write:
    layout = step.rule.layout
    halves = halves_of(step.rule, mesh)
    host = cut_out(read_tensor(step.tensor), step.rule)
    if host.dtype == np.float64:  # jax has no such arrays by default
        host = host.astype(np.float32)
    moved = move(host, _source_sharding(layout, mesh))
    start = np.array(step.start, np.int32)
    return Write(_write, (parameter, moved, start, layout, lies, halves))


def place_scale(step: ScaleStep, parameter: jax.Array, lies: NamedSharding) -> jax.Array:
    """`parameter` with the step's scales in it; `parameter` itself is used up."""
    scale_K = step.settle(None if step.tensor is None else read_tensor(step.tensor))
    return _write_scale(parameter, scale_K, np.array(step.start, np.int32), lies)


@partial(jax.jit, static_argnames="lies", donate_argnames="parameter")
def _write_scale(
    parameter: jax.Array, scale_K: jax.Array, start: jax.Array, lies: NamedSharding
) -> jax.Array:
    return _put(parameter, scale_K[None], start, lies)


def _source_sharding(layout: Layout, mesh: Mesh) -> NamedSharding:
    """The source split as its target will be: a group of axes by its first letter. Kv heads that
    get repeated, and groups, are fewer than the devices and come whole."""
    size = dict(zip((a for group in layout.source_axes for a in group), layout.sizes, strict=True))
    first = [group[0] for group in layout.source_axes]
    whole = "KX" if layout.kv_replicas > 1 else ""
    axes = [None if letter in whole else AXES[letter] for letter in first]
    return sharding(mesh, axes, [size[letter] for letter in first])


@partial(jax.jit, static_argnames=("layout", "lies", "halves"), donate_argnames="parameter")
def _write(
    parameter: jax.Array, tensor: jax.Array, start: jax.Array, layout: Layout, lies: NamedSharding,
    halves: Halves | None,
) -> jax.Array:  # fmt: skip
    """`tensor` in its place in `parameter`, which it reuses; one program per layout and dtype."""
    value = _laid_out(tensor.astype(parameter.dtype), (layout, None))
    return _put(parameter, value, start, lies, halves)


def _laid_out(value: jax.Array, way: Way) -> jax.Array:
    """What is cut out of `value`, with the axes of its target."""
    layout, cut = way
    if cut is not None:
        whole = value.reshape(cut.view)
        value = jax.lax.slice_in_dim(whole, cut.start, cut.stop, axis=cut.axis)
    letters = [letter for group in layout.source_axes for letter in group]
    order = [letter for group in layout.target_axes for letter in group]
    value = value.reshape(layout.sizes).transpose([letters.index(letter) for letter in order])
    if layout.kv_replicas > 1 and "K" in order:
        value = value.repeat(layout.kv_replicas, axis=order.index("K"))
    return value.reshape(layout.slot)


def _put(
    parameter: jax.Array, value: jax.Array, start: jax.Array, lies: NamedSharding,
    halves: Halves | None = None,
) -> Any:  # fmt: skip
    at, shape = [start[axis] for axis in range(parameter.ndim)], parameter.shape
    if halves is not None:
        axis, devices = halves
        each = shape[axis] // 2
        view = lambda x, *sizes: x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
        # Seen so, every device has all that is written of its own part of the axis.
        parameter = view(parameter, devices, 2, each // devices)
        value = view(value, -1, devices, each // devices).swapaxes(axis, axis + 1)
        at[axis : axis + 1] = [jnp.int32(0), at[axis] // each, jnp.int32(0)]
    written = jax.lax.dynamic_update_slice(parameter, value.astype(parameter.dtype), at)
    return jax.lax.with_sharding_constraint(written.reshape(shape), lies)


def halves_of(rule: Rule, mesh: Mesh, axes: Sequence[str] | None = None) -> Halves | None:
    """Where the place of `rule`, or of an array of a form with these `axes` for each matrix, has
    gates and ups; None where it has none, or no device shares them."""
    devices, both = ways(mesh, "expert_ffw"), ("P", "I")
    if devices == 1 or both not in rule.axes or (axes is not None and OUT not in axes):
        return None
    layers = int(STACKED in rule.target)
    if axes is None:
        return Halves(layers + rule.axes.index(both), devices)
    return Halves(layers + int(EXPERTS in rule.axes) + list(axes).index(OUT), devices)


@partial(jax.jit, static_argnames=("halves", "lies"), donate_argnames="array")
def in_halves(array: jax.Array, halves: Halves, lies: NamedSharding) -> jax.Array:
    """`array` [layers, ...], of gates and then of ups, as `halves` says; it is used up."""
    nothing = jnp.zeros(array.ndim, jnp.int32)

    def one(layer: jax.Array, array: jax.Array) -> jax.Array:  # a copy of all may not fit
        value = jax.lax.dynamic_slice_in_dim(array, layer, 1)
        return _put(array, value, nothing.at[0].set(layer), lies, halves)

    return jax.lax.fori_loop(0, array.shape[0], one, array)


def place_packed(
    step: PackedStep, parameter: QTensor | jax.Array, target: Any, mesh: Mesh, orders: Orders
) -> QTensor | jax.Array:
    """`place` for a matrix of a quantized format; `target` is the QTensor, or array, of
    ShapeDtypeStructs that `parameter` is to be. `orders` are those of the inputs so far, by their
    places. Raises CheckpointError where one place gets two."""
    done = write_packed(step, parameter, target, mesh, orders, on_mesh).run()
    return replace(parameter, **done) if isinstance(parameter, QTensor) else done


def write_packed(
    step: PackedStep, parameter: Any, target: Any, mesh: Mesh, orders: Orders, move: Move
) -> Write:
    host = {role: read_tensor(tensor) for role, tensor in step.tensors.items()}
    code, host = step.settle(host)
    moved = {role: move(x, _split_somewhere(x, mesh)) for role, x in host.items()}
    if not isinstance(parameter, QTensor):
        rule, stored = step.rule, tuple(np.argsort(step.matrix.axes).tolist())
        start = np.array(rule.starts[step.source], np.int32)
        way = (rule.layout, rule.cut)
        halves = halves_of(step.rule, mesh)
        arguments = parameter, moved, start, code, stored, way, target.sharding, halves
        return Write(_write_floats, arguments)
    form = parameter.form
    arrays = {name: x for name in ARRAYS if (x := getattr(parameter, name)) is not None}
    rules = array_rules(step.rule, form, step.matrix.shape[-1])
    starts = {name: np.array(r.starts[step.source], np.int32) for name, r in rules.items()}
    if "order" in host:
        place = (step.rule.target, rules["order_K"].starts[step.source])
        first, order = orders.setdefault(place, (step.matrix.module, host["order"]))
        if not np.array_equal(order, host["order"]):
            raise CheckpointError(
                f"{step.matrix.module} and {first} are one parameter, and their g_idx differ; they "
                "have the same inputs, so they must be reordered alike"
            )
    routes = tuple((name, (rule.layout, rule.cut)) for name, rule in rules.items())
    on = lambda name: halves_of(step.rule, mesh, array_axes(form, IN, OUT)[name])
    halves = tuple((name, on(name)) for name in arrays)
    lies = tuple((name, getattr(target, name).sharding) for name in arrays)
    if isinstance(code, Round):
        whole = array_rule(step.rule, (OUT, IN), step.matrix.shape[-1])
        way = (whole.layout, whole.cut)
        rounded = (arrays, moved["weight"], starts, code, form, way, lies, halves)
        return Write(_write_rounded, rounded)
    return Write(_write_packed, (arrays, moved, starts, code, form, routes, lies, halves))


def array_rules(rule: Rule, form: Form, K: int) -> dict[str, Rule]:
    """Where each array of a QTensor of `form` takes what is unpacked."""
    shapes = form.shapes(1, K)
    axes = array_axes(form, IN, OUT)
    axes |= {"order_K": (WHOLE,)} if "order_K" in axes else {}
    inside = {"data_NK": K, "order_K": K}
    if form.scales == "group":
        inside |= dict.fromkeys(("scale", "zero_GN"), shapes["scale"][0])
    if form.scales == "block":
        inside["scale"] = shapes["scale"][1]
    return {name: array_rule(rule, axes[name], inside.get(name, 0)) for name in axes}


def _split_somewhere(x: np.ndarray, mesh: Mesh) -> NamedSharding:
    """Divided among the devices, so that none holds all of it, along its longest axis that does."""
    devices = ways(mesh, "ffw")
    axes = [i for i, n in enumerate(x.shape) if n % devices == 0 and n >= devices > 1]
    if not axes:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda i: x.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, split(mesh, "ffw")))


Lies = tuple[tuple[str, NamedSharding], ...]  # by the name of an array
AllHalves = tuple[tuple[str, Halves | None], ...]


@partial(
    jax.jit, static_argnames=("code", "form", "routes", "lies", "halves"), donate_argnames="held"
)
def _write_packed(
    held: Held, parts: Held, starts: Held, code: Any, form: Form,
    routes: tuple[tuple[str, Way], ...], lies: Lies, halves: AllHalves,
) -> Held:  # fmt: skip
    values, sharding_of, halved = _arrays(unpack(code, parts), form), dict(lies), dict(halves)
    done = {}
    for name, way in routes:
        value, start = _laid_out(values[name], way), starts[name]
        if name == "scale" and form.scales == "block":  # every row has its block's until here
            value = value[..., ::FP8_BLOCK, :]
            start = _blocks(start)
        done[name] = _put(held[name], value, start, sharding_of[name], halved[name])
    return done


def _blocks(start: jax.Array) -> jax.Array:
    """The first block of 128 rows, where `start` has the first row."""
    return start.at[-2].set(start[-2] // FP8_BLOCK)


def _arrays(found: Unpacked, form: Form) -> Held:
    """The arrays of one matrix of `form` as array_rule wants them: experts, outputs, inputs."""
    *lead, N, _ = found.numbers.shape
    scale = found.scale
    if form.scales == "channel" and scale.ndim == len(lead):
        scale = jnp.broadcast_to(scale[..., None], (*lead, N))
    if found.in_blocks:
        scale = jnp.repeat(scale, FP8_BLOCK, axis=-2)[..., :N, :]
    values = {"data_NK": found.numbers, "scale": scale, "zero_GN": found.zero_NG}
    values |= {"order_K": found.order_K, "input_scale": found.input_scale}
    return {name: x for name, x in values.items() if x is not None}


@partial(jax.jit, static_argnames=("code", "form", "way", "lies", "halves"), donate_argnames="held")
def _write_rounded(
    held: Held, weight: jax.Array, starts: Held, code: Round, form: Form, way: Way, lies: Lies,
    halves: AllHalves,
) -> Held:  # fmt: skip
    """Float weights, rounded in the order of their place: blocks are of rows that lie together."""
    slot = _laid_out(weight.transpose(code.axes), way).astype(jnp.float32)
    *lead, N, K = slot.shape
    flat = slot.reshape(-1, N, K)
    data, scale = jax.lax.map(ROUNDED[code.method], flat)
    done, sharding_of, halved = {}, dict(lies), dict(halves)
    for name, value in {"data_NK": data, "scale": scale}.items():
        start = starts[name]
        if name == "scale" and form.scales == "block":
            start = _blocks(start)
        if name == "scale" and form.scales == "group" and scale.ndim == 3 and form.dtype != "int4":
            value = jnp.repeat(value, FP8_BLOCK, 1)[:, :N].swapaxes(1, 2)
        value = value.reshape(*lead, *value.shape[1:])
        done[name] = _put(held[name], value, start, sharding_of[name], halved[name])
    return done


@partial(
    jax.jit, static_argnames=("code", "stored", "way", "lies", "halves"),
    donate_argnames="parameter",
)  # fmt: skip
def _write_floats(
    parameter: jax.Array, parts: Held, start: jax.Array, code: Any, stored: tuple[int, ...],
    way: Way, lies: NamedSharding, halves: Halves | None,
) -> jax.Array:  # fmt: skip
    """A matrix that no form holds, as floats; their axes in a checkpoint are `stored`."""
    value = floats(unpack(code, parts)).transpose(stored)
    return _put(parameter, _laid_out(value, way), start, lies, halves)


def floats(found: Unpacked) -> jax.Array:
    """[*E, N, K] float32, inputs in the matrix's own order."""
    lead, scale = found.numbers.ndim - 2, found.scale
    kind = "block" if found.in_blocks else ("tensor", "channel", "group")[scale.ndim - lead]
    zero_NG = found.zero_NG
    weight = QTensor(
        form=Form(dtype="int8", scales=kind, grid=found.grid), data_NK=found.numbers,
        scale=scale.swapaxes(-1, -2) if kind == "group" else scale,
        zero_GN=None if zero_NG is None else zero_NG.swapaxes(-1, -2),
        order_K=None, input_scale=None, layer=None, device=DEVICES["cpu"], impl=None, mesh=None,
        axes=(None, None),
    )  # fmt: skip
    w_NK = dequantize(weight)
    return w_NK if found.order_K is None else w_NK[..., jnp.argsort(found.order_K)]
