"""What the decode and the prefill kernel on TPU share: fetching pages, and the online softmax."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30  # finite: the difference of two of them must not be nan


class Shapes(NamedTuple):
    """What both kernels need to know, beside the arrays."""

    N: int
    C: int
    D: int  # with what fills up its last 128 lanes
    S: int
    M: int
    granule: int  # tokens of one register tile
    scale: float


class Tiles(NamedTuple):
    decode_tokens: int  # cached tokens that are fetched, and worked on, at once
    prefill_tokens: int
    prefill_rows: int  # queries x heads that stay while the cache goes by


class Scalars(NamedTuple):
    """In SMEM."""

    counts: Any  # layer, num_decodes, num_rows
    kv_len_R: Any
    start_R: Any
    pages: Any  # R * M
    kv_scale: Any


class State(NamedTuple):
    """Of the online softmax, in VMEM: rows of queries x heads."""

    peak: Any  # [rows, 128], all lanes alike
    total: Any
    acc: Any  # [rows, C]


def fetch(do: str, c: Scalars, kv_hbm, buffer, sem, row, block, length, shapes: Shapes) -> None:
    """`do` start or wait for the copies of a row's block of pages, as far as `length` tokens."""
    pages = buffer.shape[0] // shapes.S
    count = jnp.clip(pl.cdiv(length, shapes.S) - block * pages, 0, pages)

    @pl.loop(0, count)
    def _(i):
        page = c.pages[row * shapes.M + block * pages + i]
        to = buffer.at[pl.ds(pl.multiple_of(i * shapes.S, shapes.S), shapes.S)]
        getattr(pltpu.make_async_copy(kv_hbm.at[c.counts[0], page], to, sem), do)()


def reset(state: State) -> None:
    state.peak[...] = jnp.full_like(state.peak, MASKED)
    state.total[...] = jnp.zeros_like(state.total)
    state.acc[...] = jnp.zeros_like(state.acc)


def attend(state: State, q_XC, q_XE, kv_nD, seen_Xn, scale) -> None:
    """One block of the cache: E is the lanes of the rope part."""
    C = q_XC.shape[1]
    kv_nD = kv_nD.astype(q_XC.dtype)
    score = lambda q, k: lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    s_Xn = (score(q_XC, kv_nD[:, :C]) + score(q_XE, kv_nD[:, C:])) * scale
    s_Xn = jnp.where(seen_Xn, s_Xn, MASKED)
    old = state.peak[...]
    new = jnp.maximum(old, s_Xn.max(axis=1, keepdims=True))
    p_Xn = jnp.exp(s_Xn - new[:, :1])
    shrink = jnp.exp(old - new)
    state.peak[...] = new
    state.total[...] = state.total[...] * shrink + p_Xn.sum(axis=1, keepdims=True)
    o_XC = jnp.dot(p_Xn.astype(q_XC.dtype), kv_nD[:, :C], preferred_element_type=jnp.float32)
    state.acc[...] = state.acc[...] * shrink[:, :1] + o_XC


def result(state: State, kv_scale):
    return state.acc[...] * (kv_scale / state.total[:, :1])
