"""Weights kept in few bits, and the products with them.

A `QTensor` stands where a matrix [K, N] would: its numbers are stored as [N, K] in the `Form` that
it names, and stay so in device memory. `product` is the one place where a model multiplies by a
matrix, quantized or not, `grouped_product` by those of experts, [E, N, K], and `lookup` where it
takes rows of one.

K inputs   N outputs   E experts
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.devices import Device
from xlinfer.forms import E2M1, FP8_BLOCK, TABLES, Form
from xlinfer.mesh import Part


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["data_NK", "scale", "zero_GN", "order_K", "input_scale", "layer"],
    meta_fields=["form", "device", "impl", "mesh", "axes"],
)
@dataclass(frozen=True, kw_only=True)
class QTensor:
    """With a leading axis there is one for each layer, and `layer` names the one meant. Those of
    experts have one more axis before those of each array."""

    form: Form
    data_NK: Array
    scale: Array  # float32, or the form's scale_dtype
    zero_GN: Array | None  # of the scale's dtype
    order_K: Array | None  # int32
    input_scale: Array | None  # float32
    layer: Array | None
    device: Device
    impl: Any  # of the op's; None: what the op chooses for the device
    mesh: Mesh | AbstractMesh | None  # None: it lies on one device
    axes: tuple[Part, Part]  # of the mesh, that K and N are split over

    def of_layer(self, layer: Array) -> "QTensor":
        return replace(self, layer=layer)

    def sliced(self) -> "QTensor":
        """The layer that is meant, alone; for what reads it where XLA fuses the slice."""
        if self.layer is None:
            return self
        pick = lambda a: None if a is None else lax.dynamic_index_in_dim(a, self.layer, 0, False)
        return replace(self, layer=None, **{name: pick(getattr(self, name)) for name in ARRAYS})


ARRAYS = ("data_NK", "scale", "zero_GN", "order_K", "input_scale")


@partial(jax.tree_util.register_dataclass, data_fields=["data_LENK", "layer"], meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class OfStack:
    """One layer of a stack of experts."""

    data_LENK: Array
    layer: Array


KERNEL_GROUPS = (16, 32, 64, 128)  # inputs under one scale that kernels take, or all inputs

Experts = Array | OfStack | QTensor


def apart(state: Any) -> tuple[Any, Any]:
    """A stack of layers' state as what a scan slices, and what stays whole: QTensors and experts.
    Their kernels find the layer themselves, and a slice would be a copy at every step."""
    leaves, tree = jax.tree.flatten(state, is_leaf=_stays_whole)
    sliced = [None if _stays_whole(x) else x for x in leaves]
    whole = [x if _stays_whole(x) else None for x in leaves]
    return jax.tree.unflatten(tree, sliced), jax.tree.unflatten(tree, whole)


def together(sliced: Any, whole: Any, layer: Int[Array, ""]) -> Any:
    """One layer's state: what the scan sliced, and what stayed whole, told which layer is meant."""

    def pick(one: Any, stack: Any) -> Any:
        if stack is None:
            return one
        if isinstance(stack, QTensor):
            return stack.of_layer(layer)
        value = stack.get_value()
        if isinstance(value, QTensor):
            return stack.replace(value.of_layer(layer))
        return stack.replace(OfStack(data_LENK=value, layer=layer))

    is_leaf = lambda x: x is None or _stays_whole(x)
    return jax.tree.map(pick, sliced, whole, is_leaf=is_leaf)


def _stays_whole(x: Any) -> bool:
    return isinstance(x, QTensor) or are_experts(x)


def are_experts(x: Any) -> bool:
    return isinstance(x, nnx.Variable) and bool(x.get_metadata().get("is_experts"))


def product(x: Float[Array, "... K"], matrix: nnx.Variable) -> Float[Array, "... N"]:
    """x times a matrix [K, N], which may be a QTensor."""
    weight = matrix.get_value()
    if not isinstance(weight, QTensor):
        return x @ weight
    x_MK = x.reshape(-1, x.shape[-1])
    if weight.order_K is not None:  # before K is split among devices
        order_K = weight.sliced().order_K
        assert order_K is not None
        x_MK = x_MK[:, order_K]
    y_MN = _quantized(x_MK, weight) if weight.mesh is None else _spread(x_MK, weight, weight.mesh)
    return y_MN.reshape(*x.shape[:-1], -1)


def _spread(x_MK, weight: QTensor, mesh: Mesh | AbstractMesh):
    """Each device multiplies by its own part: some of N, or of K, whose products are added."""
    of_K, of_N = weight.axes
    where = specs_of(weight, of_K, of_N)

    def local(x_MK, weight):
        y_MN = _quantized(x_MK, weight)
        return y_MN if of_K is None else lax.psum(y_MN, of_K)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(None, of_K), where),
        out_specs=PartitionSpec(None, of_N), check_vma=False,
    )  # fmt: skip
    return run(x_MK, weight)


def specs_of(weight: Experts, of_K: Part, of_N: Part, *lead: Part) -> Any:
    """How the arrays of one layer's matrices lie on a mesh, for shard_map: like `weight`, with
    PartitionSpecs. `lead` are of the axes before each array's own, but for the layers'."""
    match weight:
        case QTensor():
            axes = array_axes(weight.form, of_K, of_N)
            if weight.form.scales == "group" and weight.scale.shape[-2] == 1:  # for all inputs
                axes = axes | dict.fromkeys(axes.keys() & {"scale", "zero_GN"}, (None, of_N))
            layers = () if weight.layer is None else (None,)
            specs = {name: PartitionSpec(*layers, *lead, *of) for name, of in axes.items()}
            return replace(weight, layer=None if weight.layer is None else PartitionSpec(), **specs)
        case OfStack():
            data = PartitionSpec(None, *lead, of_N, of_K)
            return OfStack(data_LENK=data, layer=PartitionSpec())  # type: ignore[arg-type]
        case _:
            return PartitionSpec(*lead, of_N, of_K)


def array_axes(form: Form, of_K: Any, of_N: Any) -> dict[str, tuple[Any, ...]]:
    """The axes of each array of one matrix, named as those of K and N are."""
    scale = {"tensor": (), "channel": (of_N,), "group": (of_K, of_N), "block": (of_N, of_K)}
    every = {
        "data_NK": (of_N, of_K),
        "scale": scale[form.scales],
        "zero_GN": (of_K, of_N),
        "order_K": (None,),  # whole: it is used before K is split
        "input_scale": (),
    }
    return {name: every[name] for name in form.shapes(1, 1)}


def lookup(table: nnx.Variable, index: Int[Array, "..."]) -> Float[Array, "... K"]:
    """Rows of a matrix [N, K], which may be a QTensor; of its numbers' dtype, else float32."""
    weight = table.get_value()
    if not isinstance(weight, QTensor):
        return weight[index]
    rows = index.reshape(-1)
    take = lambda a_GN: None if a_GN is None else a_GN[:, rows]
    scale = weight.scale
    some = replace(
        weight, data_NK=weight.data_NK[rows], zero_GN=take(weight.zero_GN),
        scale=take(scale) if weight.form.scales == "group" else scale[rows],
    )  # fmt: skip
    return dequantize(some).reshape(*index.shape, -1)


def grouped_product(
    x_MK: Float[Array, "M K"], weight: Experts, size_E: Int[Array, " E"], device: Device
) -> Float[Array, "M N"]:
    """Rows sorted by expert, size_E of them for each, times their expert's matrix [N, K]; rows
    past the sum come out as zeros. Float weights may be differentiated."""
    match weight:
        case QTensor():
            return _quantized_experts(x_MK, weight, size_E)
        case OfStack():
            return _float_experts(x_MK, weight, size_E, device)
        case _:
            stack = OfStack(data_LENK=weight[None], layer=jnp.int32(0))
            return _float_experts(x_MK, stack, size_E, device)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _float_experts(x_MK, weight: OfStack, size_E, device: Device):
    from pallas_kernels.grouped_matmul import grouped_matmul

    return grouped_matmul(x_MK, weight.data_LENK, size_E, layer=weight.layer, device=device)


@_float_experts.defjvp
def _(device: Device, primals, tangents):
    """By XLA's own grouped product, which knows its derivatives."""
    (x_MK, weight, size_E), (dx_MK, dweight, _) = primals, tangents

    def by_xla(x_MK, w_LENK):
        w_ENK = jax.lax.dynamic_index_in_dim(w_LENK, weight.layer, keepdims=False)
        return jax.lax.ragged_dot(x_MK, w_ENK.swapaxes(1, 2), size_E)

    dy_MN = by_xla(dx_MK, weight.data_LENK) + by_xla(x_MK, dweight.data_LENK)
    return _float_experts(x_MK, weight, size_E, device), dy_MN


def _quantized_experts(x_MK, weight: QTensor, size_E):
    from pallas_kernels.grouped_matmul import grouped_matmul

    if weight.order_K is not None:
        order_EK = weight.sliced().order_K
        assert order_EK is not None
        expert_M = jnp.searchsorted(jnp.cumsum(size_E), jnp.arange(x_MK.shape[0]), side="right")
        order_MK = order_EK.at[expert_M].get(mode="clip")
        x_MK = jnp.take_along_axis(x_MK, order_MK, axis=1)
    if has_kernel(weight):
        return grouped_matmul(
            x_MK, weight.data_NK, size_E, scale=weight.scale, zero=weight.zero_GN,
            grid=_grid(weight.form), device=weight.device, impl=weight.impl, layer=weight.layer,
        )  # fmt: skip
    # One expert after another, so that one float matrix exists at a time.
    one = weight.sliced()
    end_E = jnp.cumsum(size_E)
    row_M = jnp.arange(x_MK.shape[0])

    def add(expert, y_MN):
        pick = lambda a: None if a is None else lax.dynamic_index_in_dim(a, expert, 0, False)
        w = replace(one, **{name: pick(getattr(one, name)) for name in ARRAYS})
        mine_M = (row_M >= end_E[expert] - size_E[expert]) & (row_M < end_E[expert])
        return jnp.where(mine_M[:, None], _dequantized(x_MK, w), y_MN)

    y_MN = jnp.zeros((x_MK.shape[0], weight.data_NK.shape[-2]), x_MK.dtype)
    return lax.fori_loop(0, size_E.shape[0], add, y_MN)


def has_kernel(weight: QTensor) -> bool:
    """Whether an op reads the numbers as they lie; others become floats, a layer at a time."""
    form = weight.form
    if form.scales != "group":
        return not form.input_scale or form.scales == "tensor" or form.dtype == "int8"
    one_group = weight.scale.shape[-2] == 1
    return form.dtype != "float8_e4m3fn" and (form.group in KERNEL_GROUPS or one_group)


def _grid(form: Form) -> Any:
    """As the ops name it."""
    return TABLES[form.grid] if form.grid in TABLES else form.grid


def _quantized(x_MK: Float[Array, "M K"], weight: QTensor) -> Float[Array, "M N"]:
    from pallas_kernels.fp8_matmul import fp8_matmul
    from pallas_kernels.int4_matmul import int4_matmul
    from pallas_kernels.int8_matmul import int8_grouped_matmul, int8_matmul

    form, w, scale = weight.form, weight.data_NK, weight.scale
    given: dict[str, Any] = {
        "device": weight.device, "impl": weight.impl, "layer": weight.layer,
    }  # fmt: skip
    # The ops round inputs by token, and by a scale of their own only e4m3 under one scale.
    static = form.input_scale and not (form.activations == "fp8" and form.scales == "tensor")
    if static:
        x_MK = _rounded(x_MK, weight)
    rounds = form.activations != "float" and not static
    if not has_kernel(weight):
        return _dequantized(x_MK, weight.sliced())
    match form.dtype:
        case "int4" | "uint4":
            return int4_matmul(x_MK, w, scale, weight.zero_GN, grid=_grid(form), **given)
        case "int8" if form.scales == "group":
            return int8_grouped_matmul(x_MK, w, scale, weight.zero_GN, **given)
        case "int8":
            return int8_matmul(x_MK, w, scale, activations="int8" if rounds else "float", **given)
        case _:
            how = "e4m3" if rounds else "float"
            return fp8_matmul(
                x_MK, w, scale, activations=how, x_scale=None if static else weight.input_scale,
                **given,
            )  # fmt: skip


def _rounded(x_MK, weight: QTensor):
    """What a static scale leaves of the inputs in 8 bits, as floats."""
    scale = weight.sliced().input_scale
    assert scale is not None
    y_MK = x_MK.astype(jnp.float32) / scale
    if weight.form.activations == "int8":
        q_MK = jnp.clip(jnp.round(y_MK), -128, 127)
    else:
        q_MK = jnp.clip(y_MK, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return (q_MK * scale).astype(x_MK.dtype)


def _dequantized(x_MK, weight: QTensor):
    w_NK = dequantize(weight).astype(x_MK.dtype)
    return jnp.einsum("MK,NK->MN", x_MK, w_NK, preferred_element_type=jnp.float32).astype(
        x_MK.dtype
    )


def dequantize(weight: QTensor) -> Float[Array, "*E N K"]:
    """One layer's numbers times their scales, in float32; inputs in the order of the numbers."""
    form, q = weight.form, weight.data_NK
    match form.grid:
        case "int":
            w = q.astype(jnp.float32)
        case "e2m1":
            q = q.astype(jnp.int32)
            w = jnp.sign(q).astype(jnp.float32) * jnp.asarray(E2M1, jnp.float32)[jnp.abs(q)]
        case grid:
            w = jnp.asarray(TABLES[grid], jnp.float32)[q.astype(jnp.int32)]
    *lead, N, K = w.shape
    scale = weight.scale.astype(jnp.float32)
    match form.scales:
        case "tensor":
            return w * scale[..., None, None]
        case "channel":
            return w * scale[..., None]
        case "block":
            wide = jnp.repeat(scale, FP8_BLOCK, -2)[..., :N, :]
            return w * jnp.repeat(wide, FP8_BLOCK, -1)[..., :K]
    w = w.reshape(*lead, N, scale.shape[-2], -1)
    if weight.zero_GN is not None:
        w = w - weight.zero_GN.astype(jnp.float32).swapaxes(-1, -2)[..., None]
    return (w * scale.swapaxes(-1, -2)[..., None]).reshape(*lead, N, K)
