"""Rounding float weights to few bits: all of a model's at once, or one as it is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from pallas_kernels.checks import check_one_of
from pallas_kernels.devices import Device, check_runs
from xlinfer.forms import FP8_BLOCK, Form, form_of
from xlinfer.mesh import sharding, split, ways
from xlinfer.quant import ARRAYS, QTensor, are_experts, array_axes


def quantize(
    weight: Float[Array, "..."], method: str, device: Device, impl: str | None = None
) -> QTensor:
    """`weight` [(L,) K, N] rounded to the nearest number of `method`'s grid, symmetric, the
    largest magnitude of a group, channel or block on the grid's last point."""
    one = lambda w_KN: ROUNDED[method](w_KN.T.astype(jnp.float32))
    data_NK, scale = jax.vmap(one)(weight) if weight.ndim == 3 else one(weight)
    return _tensor(form_of(method, weight.shape[-2]), data_NK, scale, device, impl)


def quantize_experts(
    weight: Float[Array, "*L E N K"], method: str, device: Device, impl: str | None = None
) -> QTensor:
    """`quantize` for the matrices of experts."""
    layer = jax.vmap(lambda w_NK: ROUNDED[method](w_NK.astype(jnp.float32)))
    # One layer after another: a float32 copy of them all may not fit.
    data_NK, scale = jax.lax.map(layer, weight) if weight.ndim == 4 else layer(weight)
    return _tensor(form_of(method, weight.shape[-1]), data_NK, scale, device, impl)


def _tensor(form: Form, data_NK, scale, device: Device, impl: str | None) -> QTensor:
    return QTensor(
        form=form, data_NK=data_NK, scale=scale, zero_GN=None, order_K=None, input_scale=None,
        layer=None, device=device, impl=impl, mesh=None, axes=(None, None),
    )  # fmt: skip


def _int4(w_NK):
    N, K = w_NK.shape
    group = form_of("int4", K).group
    w_NGg = w_NK.reshape(N, -1, group)
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


ROUNDED = {"int4": _int4, "int8": _int8, "fp8": _fp8}
IMPLS = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")


def _scale(largest, last: float):
    """All zeros need no scale, but a scale of zero would divide by it."""
    return jnp.where(largest == 0, 1.0, largest / last)


def check_choice(method: str, impl: str | None, device: Device) -> None:
    """Raise ValueError for a method or an `impl` that there is not, or not on `device`."""
    check_one_of("quantization", method, ROUNDED)
    check_impl(impl, device)


def check_impl(impl: str | None, device: Device) -> None:
    if impl is not None:
        check_one_of("matmul_impl", impl, IMPLS)
        check_runs("matmul_impl", impl, device)


def quantize_model(model: nnx.Module, method: str, device: Device, impl: str | None = None) -> None:
    """Replace, in place and one after another, every matrix that `product` or `grouped_product`
    reads in `model`; embedding, head, routers, norms and biases keep their dtype.

    Works on abstract models (nnx.eval_shape) too. Raises ValueError when the model has no such
    weight, when one of them is quantized already or its devices do not divide the scales, and for
    an `impl` of another platform than the device's.
    """
    check_choice(method, impl, device)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    chosen = [(path, param) for path, param in flat if is_matrix(param)]
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no weight that can be quantized")
    for path, param in chosen:
        weight = param.get_value()
        if isinstance(weight, QTensor):
            raise ValueError(f"{'.'.join(map(str, path))} is quantized already")
        K = weight.shape[-1 if are_experts(param) else -2]
        held = held_as(param, path, form_of(method, K), device, impl)
        if not isinstance(weight, jax.ShapeDtypeStruct):
            how = quantize_experts if are_experts(param) else quantize
            run = lambda w, how=how, held=held: replace(
                how(w, method, device, impl), mesh=held.mesh, axes=held.axes
            )
            placed = held.scale.sharding is not None
            places = jax.tree.map(lambda x: x.sharding, held) if placed else None
            held = jax.jit(run, out_shardings=places)(weight)
        nnx.update(model, nnx.from_flat_state([(path, param.replace(held))]))


def is_matrix(param: nnx.Variable) -> bool:
    """Whether `product` or `grouped_product` reads it."""
    return bool(param.get_metadata().get("is_matrix")) or are_experts(param)


def axes_of(param: nnx.Variable) -> tuple[str | None, ...]:
    """The logical axes of a whole parameter: its own metadata does not know that it is stacked."""
    axes = tuple(param.get_metadata("logical_axes"))
    return ("layers",) * (param.get_value().ndim - len(axes)) + axes


def held_as(
    param: nnx.Variable, path: Sequence[Any], form: Form, device: Device, impl: str | None
) -> QTensor:
    """The QTensor of ShapeDtypeStructs that `param`, a float matrix or its ShapeDtypeStruct, is to
    be, placed as it is. Raises ValueError where its devices do not divide the scales.

    A parameter is [(L,) K, N], of experts [(L,) E, N, K], and of what rows are taken from [N, K].
    """
    weight, axes = param.get_value(), axes_of(param)
    outputs_first = are_experts(param) or param.get_metadata().get("is_table")
    shapes = dict(zip(axes[-2:], weight.shape[-2:], strict=True))
    of_N, of_K = axes[-2:] if outputs_first else axes[:-3:-1]
    N, K = shapes[of_N], shapes[of_K]
    lead, lead_axes = weight.shape[:-2], axes[:-2]
    mesh = weight.sharding.mesh if isinstance(weight.sharding, NamedSharding) else None
    spread = mesh is not None and mesh.size > 1
    arrays: dict[str, Any] = dict.fromkeys(ARRAYS)
    of_scale = form.scale_dtype if weight.dtype == form.scale_dtype else "float32"
    dtypes = {
        "data_NK": form.dtype, "scale": of_scale, "zero_GN": of_scale, "order_K": "int32",
        "input_scale": "float32",
    }  # fmt: skip
    for name, shape in form.shapes(N, K).items():
        names = array_axes(form, of_K, of_N)[name]
        if name in ("scale", "zero_GN") and form.scales == "group" and shape[0] == 1:
            names = (None, of_N)  # all inputs have one scale, wherever they are
        lies = None
        if mesh is not None:
            try:
                lies = sharding(mesh, (*lead_axes, *names), (*lead, *shape))
            except ValueError as error:
                raise ValueError(
                    f"{'.'.join(map(str, path))} [{N}, {K}] is {form.describe()}, and {error}: "
                    "every device must have whole groups"
                ) from None
        dtype = jnp.dtype(dtypes[name])
        arrays[name] = jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=lies)
    on_mesh = (None, None)
    if mesh is not None and spread:
        on_mesh = (split(mesh, of_K, K), split(mesh, of_N, N))
    if spread and form.scales == "block":
        _check_whole_blocks(path, form, mesh, {of_K: K, of_N: N})
    own = spread and not are_experts(param)  # experts are divided by their module
    if mesh is not None and not own and form.permuted and split(mesh, of_K) is not None:
        raise ValueError(
            f"{'.'.join(map(str, path))} is {form.describe()}, and devices that share experts have "
            f"some of those inputs each: expert_parallel_size must be {ways(mesh, 'heads')}"
        )
    return QTensor(
        form=form, layer=None, device=device, impl=impl, mesh=mesh if own else None,
        axes=on_mesh if own else (None, None), **arrays,
    )  # fmt: skip


def _check_whole_blocks(path, form: Form, mesh: Any, sizes: Mapping[Any, int]) -> None:
    for axis, size in sizes.items():
        if split(mesh, axis, size) is not None and size // ways(mesh, axis) % FP8_BLOCK:
            raise ValueError(
                f"{'.'.join(map(str, path))} is {form.describe()}, and {size} rows or columns on "
                f"{ways(mesh, axis)} devices end within a block: every device must have whole ones"
            )
