"""By op: what else computes the same on this machine, within JAX. Each takes the inputs of the
op's reference; what other libraries hold ready in memory (weights in bf16, keys and values side by
side) is prepared off the clock. torch's are in torch_timing.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import (
    fp8_matmul,
    grouped_matmul,
    int4_matmul,
    mla_attention,
    paged_attention,
)
from pallas_kernels.devices import DEVICES, Device
from tools.gpu_check import job as jobs
from tools.gpu_check.entrants import Entrant

FULL = 2**30  # a window that never ends
MLA_SCALE = (128 + 64) ** -0.5
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


def alternatives(op: str, case: Any, device: Device) -> list[Entrant]:
    """All that may run; those that fail say so when they are compiled or run."""
    return OPS[op](case, device)


def reference(op: str, case: Any) -> Entrant:
    """The op's definition, compiled by XLA for the device."""
    cases = jobs.cases_of(op)
    return Entrant(
        name="XLA reference",
        run=cases.call(case, "reference", DEVICES["cpu"]),
        whole=True,
        calls=1,  # it may take a second
    )


def dot(x_MK: jax.Array, w_NK: jax.Array) -> jax.Array:
    return jnp.einsum("MK,NK->MN", x_MK, w_NK, preferred_element_type=x_MK.dtype)


def dots(device: Device, prepare: Callable, *, name: str = "bf16 product", same=True):
    """A product of 16-bit operands, by XLA's choice and by cuBLASLt."""
    one = partial(Entrant, run=dot, prepare=prepare, same=same)
    if device.platform == "cpu":
        return [one(name=name)]
    return [one(name=f"{name}, XLA"), one(name=f"{name}, cuBLASLt", options=CUBLAS)]


def _by_xla(op: Callable, name: str, case: Any) -> Entrant:
    """A step of attention by the reference, in the dtypes that the kernel has: the reference that
    a kernel is held to computes in float32 from a float32 cache."""
    cases = jobs.cases_of(name)
    decode_only = cases.num_decodes(case) == len(case.queries)
    fixed = {"device": DEVICES["cpu"], "impl": "reference", "decode_only": decode_only}

    def paged(*args):
        *args, window, sinks, alibi, kv_scales = args
        options = {"sinks_N": sinks, "alibi_N": alibi, "kv_scales": kv_scales}
        options["attention_chunk_size"] = case.attention_chunk_size
        scale = case.scale or case.H**-0.5
        return op(*args, window=window, scale=scale, softcap=case.softcap, **options, **fixed)

    def latent(*args):
        *args, kv_scale = args
        return op(*args, scale=MLA_SCALE, kv_scale=kv_scale, **fixed)

    run = paged if name == "paged_attention" else latent
    return Entrant("XLA reference", run, donated=cases.DONATED, whole=True, calls=1)


def _paged_attention(case: Any, device: Device) -> list[Entrant]:
    found = [_by_xla(paged_attention.write_and_attend, "paged_attention", case)]
    odd = case.sinks or case.alibi or case.softcap is not None
    odd |= case.attention_chunk_size is not None
    scale = case.scale or case.H**-0.5
    if not odd and set(case.queries) == {1} and case.window >= FULL:
        found.append(Entrant("cudnn, keys side by side", partial(_decode, scale), prepare=_gather))
    if not odd and len(case.queries) == 1 and case.cached == (0,):
        window = None if case.window >= FULL else (case.window - 1, 0)
        run = lambda q, k, v: _cudnn(q[None], k[None], v[None], scale, window)[0]
        found.append(
            Entrant("cudnn, keys side by side", run, prepare=lambda q, k, v, *_: (q, k, v))
        )
    return found


def _gather(q, k, v, pages, layer, page_T, slot_T, ragged, window, sinks, alibi, kv_scales):
    """The rows' keys and values, this step's included, side by side in 16 bits."""
    pages = paged_attention.reference.write(k, v, *pages, layer, page_T, slot_T, kv_scales)
    scales = kv_scales or (jnp.ones(k.shape[1]),) * 2

    def dense(cache, scale_K):
        x_RMKSH = cache[layer, ragged.pages_RM].astype(q.dtype)
        x_RMKSH *= scale_K.astype(q.dtype)[None, None, :, None, None]
        R, M, K, S, H = x_RMKSH.shape
        return jnp.moveaxis(x_RMKSH, 2, 3).reshape(R, M * S, K, H)

    return q[:, None], *(dense(c, s) for c, s in zip(pages, scales, strict=True)), ragged.kv_len_R


def _decode(scale, q_R1NH, k_RnKH, v_RnKH, len_R):
    one_R = jnp.ones_like(len_R)
    return jax.nn.dot_product_attention(
        q_R1NH, k_RnKH, v_RnKH, scale=scale, query_seq_lengths=one_R, key_value_seq_lengths=len_R,
        implementation="cudnn",
    )[:, 0]  # fmt: skip


def _cudnn(q_BTNH, k_BTKH, v_BTKH, scale, window, causal=True):
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, scale=scale, is_causal=causal, local_window_size=window,
        implementation="cudnn",
    )  # fmt: skip


def _mla_attention(case: Any, device: Device) -> list[Entrant]:
    found = [_by_xla(mla_attention.write_and_attend, "mla_attention", case)]
    if set(case.queries) == {1} and case.kv_dtype is None:
        run = partial(_mla_decode, case.C)
        found.append(Entrant("XLA, latents side by side", run, prepare=_mla_gather))
    return found


def _mla_gather(q, q_rope, latent, rope, pages, layer, page_T, slot_T, ragged, kv_scale):
    kv_LPSD = pages.kv_LPSD.at[layer, page_T, slot_T].set(jnp.concatenate([latent, rope], -1))
    kv_RMSD = kv_LPSD[layer, ragged.pages_RM]
    q_RND = jnp.concatenate([q, q_rope], -1)
    return q_RND, kv_RMSD.reshape(kv_RMSD.shape[0], -1, kv_RMSD.shape[-1]), ragged.kv_len_R


def _mla_decode(C, q_RND, kv_RnD, len_R):
    s_RNn = jnp.einsum("RND,RnD->RNn", q_RND, kv_RnD, preferred_element_type=jnp.float32)
    seen_R1n = (jnp.arange(kv_RnD.shape[1])[None] < len_R[:, None])[:, None]
    p_RNn = jax.nn.softmax(jnp.where(seen_R1n, s_RNn * MLA_SCALE, -jnp.inf))
    o_RNC = jnp.einsum(
        "RNn,RnC->RNC", p_RNn.astype(kv_RnD.dtype), kv_RnD[..., :C],
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return o_RNC.astype(q_RND.dtype)


def _flash_attention(case: Any, device: Device) -> list[Entrant]:
    """cuDNN is one of the op's own implementations; where it refuses, XLA is what is left."""
    refused = "cudnn" not in jobs.cases_of("flash_attention").impls(case, device)
    return [reference("flash_attention", case)] if refused else []


def _int4_matmul(case: Any, device: Device) -> list[Entrant]:
    def wide(x, w, scale, zero=None):
        return x, int4_matmul.reference.dequantize(w, scale, zero, case.grid).astype(x.dtype)

    fused = Entrant("XLA, dequantise and dot", lambda *args: dot(*wide(*args)))
    return [*dots(device, wide), fused]


def _int8_matmul(case: Any, device: Device) -> list[Entrant]:
    def wide(x, w, scale, zero=None):
        scale_GN = scale if scale.ndim == 2 else scale[None]
        return x, int4_matmul.reference.dequantize(w, scale_GN, zero, "int").astype(x.dtype)

    return [*dots(device, wide), reference("int8_matmul", case)]


def _fp8_matmul(case: Any, device: Device) -> list[Entrant]:
    definition = fp8_matmul.reference

    def wide(x, w, w_scale, x_scale=None):
        """Both operands as the product sees them, in x's dtype."""
        w_wide = definition.dequantize(w, w_scale).astype(x.dtype)
        if case.activations == "float":
            return x, w_wide
        q, scale_MG = definition.quantize(x, w_scale, x_scale)
        if w_scale.ndim == 2:
            scale_MG = jnp.repeat(scale_MG, definition.BLOCK, 1)[:, : x.shape[1]]
        x_wide = q.astype(jnp.float32) * jnp.broadcast_to(scale_MG, x.shape)
        return x_wide.astype(x.dtype), w_wide

    def narrow(x, w, w_scale, x_scale=None):
        return definition.quantize(x, w_scale, x_scale)[0], w

    def unscaled(q, w):
        return jnp.einsum("MK,NK->MN", q, w, preferred_element_type=jnp.bfloat16)

    fused = Entrant("XLA, dequantise and dot", lambda *args: dot(*wide(*args)))
    if case.activations == "float":
        return [*dots(device, wide), fused]
    return [
        *dots(device, wide),
        fused,
        Entrant("fp8 product without scales, XLA", unscaled, prepare=narrow, same=False),
    ]


def _grouped_matmul(case: Any, device: Device) -> list[Entrant]:
    definition = grouped_matmul.reference

    def wide(x, w_ENK, sizes, scale, zero):
        if scale is None:
            return x, w_ENK, sizes
        one = lambda w, s, z: definition.dequantize(w, s, z, case.grid).astype(x.dtype)
        axes = (0, 0, None if zero is None else 0)
        return x, jax.vmap(one, in_axes=axes)(w_ENK, scale, zero), sizes

    def first(x, w_ENK, sizes, scale, zero):
        one = lambda a: None if a is None else a[:1]
        x, w_ENK, _ = wide(x, w_ENK[:1], sizes, one(scale), one(zero))
        return x, w_ENK[0]

    ragged = Entrant("XLA ragged_dot in bf16", _ragged_dot, prepare=wide)
    return [ragged, *dots(device, first, name="one dense bf16 product", same=False)]


def _ragged_dot(x_MK, w_ENK, sizes_E):
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return lax.ragged_dot_general(
        x_MK, w_ENK, sizes_E, dimensions, preferred_element_type=x_MK.dtype
    )


OPS: dict[str, Callable[[Any, Device], list[Entrant]]] = {
    "paged_attention": _paged_attention,
    "mla_attention": _mla_attention,
    "flash_attention": _flash_attention,
    "int4_matmul": _int4_matmul,
    "fp8_matmul": _fp8_matmul,
    "int8_matmul": _int8_matmul,
    "grouped_matmul": _grouped_matmul,
}
