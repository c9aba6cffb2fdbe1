"""Attention of whole rows to themselves: the first chunk of a prefill, a researcher's forward.

B rows   T tokens of a row   N query heads   K kv heads   H head_dim of q and k   V of v and o
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.checks import (
    check_distance_bias,
    check_dtype,
    check_one_of,
    check_rank,
    check_shape,
)
from pallas_kernels.devices import Device, Impl, mosaic
from pallas_kernels.flash_attention import cudnn, reference
from pallas_kernels.reach import check_chunk_size

__all__ = ["choose", "flash_attention"]

HEAD_DIMS = (64, 80, 96, 128, 192, 256)  # that the kernels are tested with
HALF, FLOATS = ("bfloat16", "float16"), ("bfloat16", "float16", "float32")
DTYPES: Mapping[Impl, tuple[str, ...]] = {
    "reference": FLOATS,
    "mosaic_gpu": HALF,
    "mosaic_tpu": FLOATS,
    "cudnn": HALF,
}


def choose(device: Device, *, H: int, V: int, dtype: Any, distance_bias: bool = False) -> Impl:
    """What the op runs on `device`: its Mosaic kernel if that takes these head_dims and q's dtype,
    else the reference, which alone adds a bias by distance. cuDNN would need a measurement that
    says so."""
    impl = mosaic(device)
    taken = H in HEAD_DIMS and V in HEAD_DIMS and jnp.dtype(dtype).name in DTYPES[impl]
    return impl if taken and not distance_bias else "reference"


def flash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKV: Float[Array, "B T K V"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None,
    attention_chunk_size: int | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sinks_N: Float[Array, " N"] | None = None,
    alibi_N: Float[Array, " N"] | None = None,
    distance_bias_NX: Float[Array, "N X"] | None = None,
    lengths_B: Int[Array, " B"] | None = None,
    device: Device,
    impl: Impl | None = None,
    interpret: Any = False,
    tiles: tuple | None = None,
) -> Float[Array, "B T N V"]:
    """softmax(q·k · scale)·v, each query head n with kv head n // (N/K), in q's dtype.

    A query sees the keys up to itself, of those the `window` latest (an int, an int32 scalar, or
    None for all), and of those the ones of its own chunk where rows are cut into chunks of
    `attention_chunk_size` tokens; or with `causal=False` every key of its row. A logit s is scaled,
    becomes softcap·tanh(s/softcap) where `softcap` is given, and gains alibi_N[n]·(key position -
    query position), at most 0 for slopes above it. With X = 2 M + 1 it gains
    distance_bias_NX[n, M + d] too, d being key position - query position, cut to -M and M.
    exp(sinks_N[n]) joins the softmax's denominator. Sinks, slopes and biases are float32; so is the
    softmax.

    Row b has lengths_B[b] tokens (int32; None: all T). What follows is padding: finite, never
    seen, and its outputs are zeros.

    bfloat16 or float16, with float32 too as `reference` and `mosaic_tpu`. The kernels take H and
    V of 64, 80, 96, 128, 192 and 256; `cudnn` takes neither chunks, softcap, sinks, slopes nor a
    traced window, and no kernel a bias by distance. `impl` None is `choose(device, ...)`; a named
    one never falls back to another. `tiles` are the kernel's Tiles, None for its own choice.
    ValueError names the argument at fault.

    grad and jvp of `reference` are jax's own. A kernel's grad is the gradient of the reference at
    the same arguments: right, O(T) in memory, and not fast; it has no jvp. vmap works for all,
    the batch axis B being the better way for a kernel.
    """
    _check(q_BTNH, k_BTKH, v_BTKV, sinks_N, alibi_N, distance_bias_NX, lengths_B)
    _check_options(scale, window, attention_chunk_size, causal, softcap)
    H, V = q_BTNH.shape[-1], v_BTKV.shape[-1]
    biased = distance_bias_NX is not None
    impl = impl or choose(device, H=H, V=V, dtype=q_BTNH.dtype, distance_bias=biased)
    check_one_of("impl", impl, _allowed(device))
    check_dtype("q_BTNH", q_BTNH, DTYPES[impl])
    if biased and impl != "reference":
        raise ValueError(f"distance_bias_NX is given; impl {impl} takes none, the reference does")
    if impl in ("mosaic_gpu", "mosaic_tpu"):
        check_one_of("H", H, HEAD_DIMS)
        check_one_of("V", V, HEAD_DIMS)
    if impl == "cudnn":
        wrong = cudnn.refusal(
            H=H, V=V, window=window, attention_chunk_size=attention_chunk_size, softcap=softcap,
            sinks_N=sinks_N, alibi_N=alibi_N,
        )  # fmt: skip
        if wrong is not None:
            raise ValueError(wrong)
        return cudnn.attend(
            q_BTNH, k_BTKH, v_BTKV, scale=scale, causal=causal, window=window, lengths_B=lengths_B
        )
    constant = window is None or isinstance(window, int)
    arrays = _Arrays(
        q_BTNH, k_BTKH, v_BTKV, None if constant else window, sinks_N, alibi_N, lengths_B
    )
    options = {
        "scale": scale, "causal": causal, "softcap": softcap,
        "attention_chunk_size": attention_chunk_size,
    }  # fmt: skip

    def run(attend, arrays: _Arrays, **how):
        q, k, v, traced, *rest = arrays
        rest = dict(zip(("sinks_N", "alibi_N", "lengths_B"), rest, strict=True))
        return attend(q, k, v, window=window if constant else traced, **options, **rest, **how)

    if impl == "reference":
        return run(reference.attend, arrays, distance_bias_NX=distance_bias_NX)
    # Pallas takes a third of a second to import, and the reference needs none of it.
    kernel = import_module(f"pallas_kernels.flash_attention.{impl}")

    @jax.custom_vjp
    def attend(arrays: _Arrays):
        how = {"device": device, "choice": tiles, "interpret": interpret}
        return run(kernel.flash_attention, arrays, **how)

    def backward(arrays: _Arrays, grad_BTNV):
        return jax.vjp(lambda a: run(reference.attend, a), arrays)[1](grad_BTNV)

    attend.defvjp(lambda arrays: (attend(arrays), arrays), backward)
    return attend(arrays)


class _Arrays(NamedTuple):
    """Everything that may be traced; None where it is not given."""

    q_BTNH: Any
    k_BTKH: Any
    v_BTKV: Any
    window: Any
    sinks_N: Any
    alibi_N: Any
    lengths_B: Any


def _allowed(device: Device) -> tuple[Impl, ...]:
    rivals: tuple[Impl, ...] = ("cudnn",) if device.platform == "cuda" else ()
    return ("reference", *dict.fromkeys((mosaic(device), *rivals)))


def _check(q_BTNH, k_BTKH, v_BTKV, sinks_N, alibi_N, distance_bias_NX, lengths_B) -> None:
    for name, x in (("q_BTNH", q_BTNH), ("k_BTKH", k_BTKH), ("v_BTKV", v_BTKV)):
        check_rank(name, x, 4)
        check_dtype(name, x, FLOATS)
    (B, T, N, H), K, V = q_BTNH.shape, k_BTKH.shape[2], v_BTKV.shape[3]
    if B * T == 0:
        raise ValueError(f"q_BTNH has shape {q_BTNH.shape}; it must have at least one token")
    if K == 0 or N % K:
        raise ValueError(f"N is {N}; it must be a multiple of K = {K}: kv heads are shared evenly")
    check_shape("k_BTKH", k_BTKH, (B, T, K, H), why="it has q_BTNH's rows, tokens and head_dim")
    check_shape("v_BTKV", v_BTKV, (B, T, K, V), why="it has k_BTKH's rows, tokens and heads")
    for name, x in (("k_BTKH", k_BTKH), ("v_BTKV", v_BTKV)):
        check_dtype(name, x, (q_BTNH.dtype,))
    for name, x in (("sinks_N", sinks_N), ("alibi_N", alibi_N)):
        if x is not None:
            check_dtype(name, x, ("float32",))
            check_shape(name, x, (N,), why="one number for each query head")
    if distance_bias_NX is not None:
        check_distance_bias(distance_bias_NX, N)
    if lengths_B is not None:
        check_dtype("lengths_B", lengths_B, ("int32",))
        check_shape("lengths_B", lengths_B, (B,), why="one length for each row")


def _check_options(scale, window, attention_chunk_size, causal, softcap) -> None:
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be above 0, or None")
    check_chunk_size(attention_chunk_size)
    for name, reach in (("window", window), ("attention_chunk_size", attention_chunk_size)):
        if reach is not None and not causal:
            raise ValueError(f"{name} is {reach}; it must be None where causal is False")
    if window is None:
        return
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1: a query sees itself")
    else:
        check_dtype("window", window, ("int32",))
