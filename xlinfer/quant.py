"""Weights kept in few bits, and the products with them.

A `QTensor` stands where a matrix [K, N] would: its numbers are stored as [N, K] in int4, int8 or
fp8 with scales, and stay so in device memory. `product` is the one place where a model multiplies
by a matrix, quantized or not, and `grouped_product` by those of experts, [E, N, K].

K inputs   N outputs   E experts
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import check_one_of
from pallas_kernels.devices import Device, check_runs

INT4_GROUP = 128  # inputs that share a scale
FP8_BLOCK = 128  # inputs and outputs that share a scale


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["data_NK", "scale", "layer"],
    meta_fields=["device", "impl"],
)
@dataclass(frozen=True, kw_only=True)
class QTensor:
    """With a leading axis there is one for each layer, and `layer` names the one meant. Those of
    experts have one more axis before N, and before the scale's axes."""

    data_NK: Array  # int4, int8 or float8_e4m3fn
    scale: Array  # int4 [K/group, N], int8 [N], fp8 [N/128, K/128]; float32
    layer: Array | None
    device: Device
    impl: str | None  # None: what the op chooses for the device

    def of_layer(self, layer: Array) -> "QTensor":
        return replace(self, layer=layer)


@partial(jax.tree_util.register_dataclass, data_fields=["data_LENK", "layer"], meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class OfStack:
    """One layer of a stack of experts."""

    data_LENK: Array
    layer: Array


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
    return isinstance(x, QTensor) or _are_experts(x)


def _are_experts(x: Any) -> bool:
    return isinstance(x, nnx.Variable) and bool(x.get_metadata().get("is_experts"))


def product(x: Float[Array, "... K"], matrix: nnx.Variable) -> Float[Array, "... N"]:
    """x times a matrix [K, N], which may be a QTensor."""
    weight = matrix.get_value()
    if isinstance(weight, QTensor):
        y_MN = _quantized(x.reshape(-1, x.shape[-1]), weight)
        return y_MN.reshape(*x.shape[:-1], -1)
    return x @ weight


def grouped_product(
    x_MK: Float[Array, "M K"], weight: Experts, size_E: Int[Array, " E"], device: Device
) -> Float[Array, "M N"]:
    """Rows sorted by expert, size_E of them for each, times their expert's matrix [N, K]; rows
    past the sum come out as zeros. Float weights may be differentiated."""
    from pallas_kernels.grouped_matmul import grouped_matmul

    match weight:
        case QTensor():
            given = {"device": weight.device, "impl": weight.impl, "layer": weight.layer}
            return grouped_matmul(x_MK, weight.data_NK, size_E, scale=weight.scale, **given)
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


def _quantized(x_MK: Float[Array, "M K"], weight: QTensor) -> Float[Array, "M N"]:
    from pallas_kernels.fp8_matmul import fp8_matmul
    from pallas_kernels.int4_matmul import int4_matmul
    from pallas_kernels.int8_matmul import int8_matmul

    given = {"device": weight.device, "impl": weight.impl, "layer": weight.layer}
    match weight.data_NK.dtype.name:
        case "int4":
            return int4_matmul(x_MK, weight.data_NK, weight.scale, **given)
        case "int8":
            return int8_matmul(x_MK, weight.data_NK, weight.scale, activations="float", **given)
        case "float8_e4m3fn":
            return fp8_matmul(x_MK, weight.data_NK, weight.scale, **given)
        case name:
            raise ValueError(f"data_NK is {name}; it must be int4, int8 or float8_e4m3fn")


def quantize(
    weight: Float[Array, "..."], method: str, device: Device, impl: str | None = None
) -> QTensor:
    """`weight` [(L,) K, N] rounded to the nearest number of `method`'s grid, symmetric, the
    largest magnitude of a group, channel or block on the grid's last point.

    int4: groups of INT4_GROUP inputs, or all inputs where that does not divide them. int8: output
    channels. fp8: blocks of FP8_BLOCK x FP8_BLOCK.
    """
    one = lambda w_KN: METHODS[method](w_KN.T.astype(jnp.float32))
    data_NK, scale = jax.vmap(one)(weight) if weight.ndim == 3 else one(weight)
    return QTensor(data_NK=data_NK, scale=scale, layer=None, device=device, impl=impl)


def quantize_experts(
    weight: Float[Array, "*L E N K"], method: str, device: Device, impl: str | None = None
) -> QTensor:
    """`quantize` for the matrices of experts."""
    layer = jax.vmap(lambda w_NK: METHODS[method](w_NK.astype(jnp.float32)))
    # One layer after another: a float32 copy of them all may not fit.
    data_NK, scale = jax.lax.map(layer, weight) if weight.ndim == 4 else layer(weight)
    return QTensor(data_NK=data_NK, scale=scale, layer=None, device=device, impl=impl)


def _int4(w_NK):
    N, K = w_NK.shape
    group = INT4_GROUP if K % INT4_GROUP == 0 else K
    w_NGg = w_NK.reshape(N, K // group, group)
    scale_NG1 = _scale(jnp.abs(w_NGg).max(-1, keepdims=True), 7)
    data = jnp.clip(jnp.round(w_NGg / scale_NG1), -8, 7).astype(jnp.int4)
    return data.reshape(N, K), scale_NG1[..., 0].T


def _int8(w_NK):
    scale_N1 = _scale(jnp.abs(w_NK).max(-1, keepdims=True), 127)
    return jnp.clip(jnp.round(w_NK / scale_N1), -127, 127).astype(jnp.int8), scale_N1[:, 0]


def _fp8(w_NK):
    (N, K), b = w_NK.shape, FP8_BLOCK
    padded = jnp.pad(w_NK, ((0, -N % b), (0, -K % b)))
    blocks = padded.reshape(padded.shape[0] // b, b, padded.shape[1] // b, b)
    scale = _scale(jnp.abs(blocks).max((1, 3), keepdims=True), 448)
    data = (blocks / scale).astype(jnp.float8_e4m3fn).reshape(padded.shape)[:N, :K]
    return data, scale[:, 0, :, 0]


METHODS = {"int4": _int4, "int8": _int8, "fp8": _fp8}
IMPLS = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")


def _scale(largest, last: float):
    """All zeros need no scale, but a scale of zero would divide by it."""
    return jnp.where(largest == 0, 1.0, largest / last)


def quantize_model(model: nnx.Module, method: str, device: Device, impl: str | None = None) -> None:
    """Replace, in place and one after another, every matrix that `product` or `grouped_product`
    reads in `model`; embedding, head, routers, norms and biases keep their dtype.

    Works on abstract models (nnx.eval_shape) too. Raises ValueError when the model has no such
    weight, when one of them is quantized already or spread over devices, and for an `impl` of
    another platform than the device's.
    """
    check_one_of("quantization", method, METHODS)
    if impl is not None:
        check_one_of("matmul_impl", impl, IMPLS)
        check_runs("matmul_impl", impl, device)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    is_chosen = lambda p: p.get_metadata().get("is_matrix") or _are_experts(p)
    chosen = [(path, param) for path, param in flat if is_chosen(param)]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no weight that can be quantized")
    for path, param in chosen:
        weight = param.get_value()
        if isinstance(weight, QTensor):
            raise ValueError(f"{'.'.join(map(str, path))} is quantized already")
        devices = 1 if weight.sharding is None else weight.sharding.num_devices
        if devices > 1:
            raise ValueError(
                f"{'.'.join(map(str, path))} is spread over {devices} "
                "devices; quantized weights live on one: tensor_parallel_size=1"
            )
        how = quantize_experts if _are_experts(param) else quantize
        run = partial(how, method=method, device=device, impl=impl)
        if isinstance(weight, jax.ShapeDtypeStruct):
            done = _placed_as(jax.eval_shape(run, weight), weight)
        else:
            done = jax.jit(run)(weight)
        nnx.update(model, nnx.from_flat_state([(path, param.replace(done))]))


def _placed_as(shapes: Any, weight: jax.ShapeDtypeStruct) -> Any:
    """On the one device of `weight`, where it has a place."""
    if weight.sharding is None:
        return shapes
    whole = jax.sharding.NamedSharding(weight.sharding.mesh, jax.P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
