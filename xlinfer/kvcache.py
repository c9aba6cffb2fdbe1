"""The seam between a model and its cache, and the paged cache behind it.

A module computes q, k and v and hands them to `attend`; whether that is dense attention over
the tokens at hand or a paged cache is the caller's business, so a researcher's forward and the
engine run the very same module.

A page holds the keys and values of `page_size` consecutive tokens of one sequence, or the latents
that stand for them, for all layers. Page 0 belongs to nobody: padding is written there and never
read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from pallas_kernels import mla_attention, paged_attention
from pallas_kernels.devices import Device, Impl
from pallas_kernels.paged_attention import (
    PackedPages,
    Pages,
    Ragged,
    Scales,
    heads_axis,
    in_parts,
)
from xlinfer.mesh import AnyMesh, by_head, split, ways

KV = Any  # the cache, a pytree threaded through the layers; None without one
FULL = 2**30  # a window that never ends
PADDING_PAGE = 0
Cache = Pages | PackedPages | mla_attention.Pages
FP8 = np.dtype(jnp.float8_e4m3fn)
CACHE_DTYPES: Mapping[str, np.dtype] = {
    "fp8": FP8,
    "fp8_e4m3": FP8,
    "bfloat16": np.dtype(jnp.bfloat16),
    "float16": np.dtype(jnp.float16),
    "float32": np.dtype(jnp.float32),
}


@runtime_checkable
class Attend(Protocol):
    """Causal attention of each token to itself and the earlier tokens of its sequence.

    q [B, T, N, H], k and v [B, T, K, H] -> o [B, T, N, H] and the cache with k and v in it.
    `layer` is the layer's index, `window` the number of tokens a query sees (itself included),
    both Python or traced integers; where there is an `attention_chunk_size`, a query sees none of
    the tokens before its own chunk of so many. `scale` multiplies q·k. A score s becomes
    softcap * tanh(s / softcap) where that is given, and gains
    alibi_N[n] * (key position - query position), and distance_bias_NX[n, M + d] for a key d after
    the query, d being cut to -M and M, X = 2 M + 1; exp(sinks_N[n]) joins the denominator of head
    n's softmax. Sinks, slopes and biases are float32. A cache of 8 bits holds k and v over
    `kv_scales`, float32 of each kv head; any other holds them as they are.
    """

    def __call__(
        self,
        q_BTNH: Array,
        k_BTKH: Array,
        v_BTKH: Array,
        kv: KV,
        *,
        layer: int | Array,
        window: int | Array,
        attention_chunk_size: int | None = None,
        scale: float,
        softcap: float | None = None,
        sinks_N: Array | None = None,
        alibi_N: Array | None = None,
        distance_bias_NX: Array | None = None,
        kv_scales: Scales | None = None,
    ) -> tuple[Array, KV]: ...


@runtime_checkable
class Keep(Protocol):
    """Puts what the decoder's layer `layer` is to see of the encoder's output, k and v
    [B, T, K, H], into the cache, and returns that."""

    def __call__(self, k_BTKH: Array, v_BTKH: Array, kv: KV, *, layer: int | Array) -> KV: ...


@runtime_checkable
class CrossAttend(Protocol):
    """Attention of each token to all keys and values that `Keep` put there for its sequence.

    q [B, T, N, H] -> o [B, T, N, H]; `scale` multiplies q·k.
    """

    def __call__(self, q_BTNH: Array, kv: KV, *, layer: int | Array, scale: float) -> Array: ...


@runtime_checkable
class LatentAttend(Protocol):
    """`Attend` to latents: head n's key is k_b_NUC[n] times a token's latent, then its rope part,
    which all heads share, and its value the latent times v_b_NCW[n].

    q [B, T, N, U] and [B, T, N, J], latent [B, T, C], rope [B, T, J] -> o [B, T, N, W] and the
    cache with latent and rope in it.
    """

    def __call__(
        self,
        q_BTNU: Array,
        q_BTNJ: Array,
        latent_BTC: Array,
        rope_BTJ: Array,
        k_b_NUC: Array,
        v_b_NCW: Array,
        kv: KV,
        *,
        layer: int | Array,
        scale: float,
    ) -> tuple[Array, KV]: ...


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What a cache holds of a token in place of keys and values; each device holds it whole."""

    latent_dim: int
    rope_dim: int


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The cache of `num_layers` layers as the attention `impl` wants it."""

    num_layers: int
    num_pages: int
    num_kv_heads: int
    page_size: int  # tokens
    head_dim: int
    latents: Latents | None  # in place of the heads' keys and values
    dtype: Any
    impl: Impl

    def page_bytes_per_device(self, mesh: AnyMesh) -> int:
        """What one device holds of one page, all layers."""
        page = jax.tree.leaves(self.with_pages(1)._per_device(mesh))
        return sum(x.size * jnp.dtype(x.dtype).itemsize for x in page)

    def with_pages(self, num_pages: int) -> "CacheSpec":
        return replace(self, num_pages=num_pages)

    def abstract(self, mesh: AnyMesh) -> Cache:
        """Each device's own heads, side by side: what packs heads together packs a device's."""
        if self.latents is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
            return jax.tree.map(place, self._per_device(mesh))
        axis, size = heads_axis(self.impl), ways(mesh, "kv_heads")
        sharding = NamedSharding(mesh, by_head(mesh, before=axis))

        def of_all(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (*x.shape[:axis], x.shape[axis] * size, *x.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        return jax.tree.map(of_all, self._per_device(mesh))

    def zeros(self, mesh: AnyMesh) -> Cache:
        """An empty cache; compiled, its results are to be placed as `abstract` says."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.abstract(mesh))

    def _per_device(self, mesh: AnyMesh) -> Cache:
        if (latents := self.latents) is not None:
            return mla_attention.cache_shapes(
                self.impl, num_layers=self.num_layers, num_pages=self.num_pages,
                page_size=self.page_size, latent_dim=latents.latent_dim,
                rope_dim=latents.rope_dim, dtype=self.dtype,
            )  # fmt: skip
        return paged_attention.cache_shapes(
            self.impl, num_layers=self.num_layers, num_pages=self.num_pages,
            num_kv_heads=self.num_kv_heads // ways(mesh, "kv_heads"), page_size=self.page_size,
            head_dim=self.head_dim, dtype=self.dtype,
        )  # fmt: skip


def cache_dtype(asked: str, activations: Any, has_scales: bool) -> np.dtype:
    """What the cache holds numbers in: "auto" is fp8 for a model that has scales for it, and else
    `activations`, the dtype that attention computes k and v in. Raises ValueError for another name
    than CACHE_DTYPES', and for another float dtype than the activations'."""
    own = np.dtype(activations)
    if asked == "auto":
        return FP8 if has_scales else own
    if asked not in CACHE_DTYPES:
        raise ValueError(
            f"kv_cache_dtype is {asked!r}; it must be one of auto, {', '.join(CACHE_DTYPES)}"
        )
    if (dtype := CACHE_DTYPES[asked]) not in (own, FP8):
        raise ValueError(
            f"kv_cache_dtype is {asked!r}, and k and v are {own}: the cache holds them as they are "
            f"or as fp8. Ask for auto, {own} or fp8, or load the weights as {asked}"
        )
    return dtype


class Step(NamedTuple):
    """Where a step's tokens go and which row each belongs to."""

    page_T: Array
    slot_T: Array
    ragged: Ragged


def step_of(page_T: Array, slot_T: Array, ragged: Ragged, mesh: AnyMesh) -> tuple[Step, Step]:
    """The whole step, and where the mesh splits its tokens what each part sees of it, along a new
    first axis; else the step again."""
    step, tokens = Step(page_T, slot_T, ragged), split(mesh, "tokens", len(page_T))
    if tokens is None:
        return step, step
    # Both are said: XLA else splits what leads to the parts, and gathers it for the whole.
    placed = lambda tree, *axes: lax.with_sharding_constraint(
        tree, NamedSharding(mesh, PartitionSpec(*axes))
    )
    step, parts = placed(step), ways(mesh, "tokens")
    by_part = lambda x_T: x_T.reshape(parts, -1)
    ragged = in_parts(step.ragged, len(page_T), parts)
    return step, placed(Step(by_part(step.page_T), by_part(step.slot_T), ragged), tokens)


def paged_attend(
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    ragged: Ragged,
    mesh: AnyMesh,
    *,
    decode_only: bool,
    device: Device,
    impl: Impl,
) -> Attend:
    """The `attend` over a paged cache for a step's tokens [1, T]; each device attends with its own
    heads, and where the mesh splits tokens with its own tokens, to the cache of them all."""
    tokens = split(mesh, "tokens", page_T.shape[0])
    step, own = step_of(page_T, slot_T, ragged, mesh)

    def attend(
        q_BTNH, k_BTKH, v_BTKH, kv: Cache, *,
        layer, window, scale, attention_chunk_size=None, softcap=None, sinks_N=None, alibi_N=None,
        distance_bias_NX=None, kv_scales=None,
    ):  # fmt: skip
        if jax.tree.leaves(kv)[0].dtype != FP8:
            kv_scales = None

        def local(q_TNH, k_TKH, v_TKH, kv, of_heads, layer, window, own: Step):
            sinks_N, alibi_N, distance_bias_NX, kv_scales = of_heads
            if tokens is not None:
                own = jax.tree.map(lambda x: x[0], own)
                k_all, v_all = lax.all_gather((k_TKH, v_TKH), tokens, tiled=True)
                kv = paged_attention.write(
                    k_all, v_all, kv, layer, step.page_T, step.slot_T, kv_scales=kv_scales,
                    device=device, impl=impl,
                )  # fmt: skip
            return paged_attention.write_and_attend(
                q_TNH, k_TKH, v_TKH, kv, layer, own.page_T, own.slot_T, own.ragged,
                window=window, attention_chunk_size=attention_chunk_size, scale=scale,
                softcap=softcap, sinks_N=sinks_N, alibi_N=alibi_N,
                distance_bias_NX=distance_bias_NX, kv_scales=kv_scales, decode_only=decode_only,
                device=device, impl=impl,
            )  # fmt: skip

        if mesh.size > 1:
            heads, one = PartitionSpec(tokens, split(mesh, "heads")), by_head(mesh, before=0)
            new = PartitionSpec(*() if tokens is None else (tokens,))
            cache, none = by_head(mesh, before=heads_axis(impl)), PartitionSpec()
            kv_specs = jax.tree.map(lambda _: cache, kv)
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(heads, heads, heads, kv_specs, one, none, none, new),
                out_specs=(heads, kv_specs),
                check_vma=False,
            )
        o_TNH, kv = local(
            q_BTNH[0], k_BTKH[0], v_BTKH[0], kv, (sinks_N, alibi_N, distance_bias_NX, kv_scales),
            jnp.asarray(layer), jnp.asarray(window), own,
        )  # fmt: skip
        return o_TNH[None], kv

    return attend


def paged_keep(
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    mesh: AnyMesh,
    *,
    device: Device,
    impl: Impl,
) -> Keep:
    """The `Keep` for one sequence's tokens [1, T] and their places in a paged cache."""

    def keep(k_BTKH, v_BTKH, kv: Cache, *, layer) -> Cache:
        def local(k_TKH, v_TKH, kv, layer):
            return paged_attention.write(
                k_TKH, v_TKH, kv, layer, page_T, slot_T, device=device, impl=impl
            )

        if mesh.size > 1:
            heads, none = by_head(mesh, before=1), PartitionSpec()
            cache = jax.tree.map(lambda _: by_head(mesh, before=heads_axis(impl)), kv)
            local = jax.shard_map(
                local, mesh=mesh, in_specs=(heads, heads, cache, none), out_specs=cache,
                check_vma=False,
            )  # fmt: skip
        return local(k_BTKH[0], v_BTKH[0], kv, jnp.asarray(layer))

    return keep


def paged_cross_attend(
    pages_TM: Int[Array, "T M"],
    len_T: Int[Array, " T"],
    num_tokens: Int[Array, ""],
    mesh: AnyMesh,
    *,
    device: Device,
    impl: Impl,
) -> CrossAttend:
    """The `CrossAttend` for a step's tokens [1, T], each with the pages and the number of its own
    sequence's encoded tokens; from `num_tokens` on they are padding.

    Every token sees all of them, so each is a row of one query, as those that decode are: it has
    no position among them, and a step has few tokens, since what is long is the encoder's.
    """
    T = len_T.shape[0]
    ragged = Ragged(pages_TM, len_T, jnp.arange(T + 1), num_tokens, num_tokens)

    def cross(q_BTNH, kv: Cache, *, layer, scale):
        def local(q_TNH, kv, layer):
            return paged_attention.attend(
                q_TNH, kv, layer, ragged, scale=scale, decode_only=True, device=device, impl=impl
            )

        if mesh.size > 1:
            heads, none = by_head(mesh, before=1), PartitionSpec()
            cache = jax.tree.map(lambda _: by_head(mesh, before=heads_axis(impl)), kv)
            local = jax.shard_map(
                local, mesh=mesh, in_specs=(heads, cache, none), out_specs=heads, check_vma=False
            )
        return local(q_BTNH[0], kv, jnp.asarray(layer))[None]

    return cross


def paged_latent_attend(
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    ragged: Ragged,
    mesh: AnyMesh,
    *,
    decode_only: bool,
    device: Device,
    impl: Impl,
) -> LatentAttend:
    """`paged_attend` to latents: each head's query goes through its k_b, so that the cache is read
    once for all heads, and its output through its v_b. Every device writes its own copy."""
    tokens = split(mesh, "tokens", page_T.shape[0])
    step, own = step_of(page_T, slot_T, ragged, mesh)

    def attend(q_BTNU, q_BTNJ, latent_BTC, rope_BTJ, k_b_NUC, v_b_NCW, kv: Cache, *, layer, scale):
        def local(q_TNU, q_TNJ, latent_TC, rope_TJ, k_b_NUC, v_b_NCW, kv, layer, own: Step):
            if tokens is not None:
                own = jax.tree.map(lambda x: x[0], own)
                latent_all, rope_all = lax.all_gather((latent_TC, rope_TJ), tokens, tiled=True)
                kv = mla_attention.write(latent_all, rope_all, kv, layer, step.page_T, step.slot_T)
            q_TNC = jnp.einsum("TNU,NUC->TNC", q_TNU, k_b_NUC)
            o_TNC, kv = mla_attention.write_and_attend(
                q_TNC, q_TNJ, latent_TC, rope_TJ, kv, layer, own.page_T, own.slot_T, own.ragged,
                scale=scale, decode_only=decode_only, device=device, impl=impl,
            )  # fmt: skip
            return jnp.einsum("TNC,NCW->TNW", o_TNC, v_b_NCW), kv

        if mesh.size > 1:
            heads, one = PartitionSpec(tokens, split(mesh, "heads")), by_head(mesh, before=0)
            new, none = PartitionSpec(*() if tokens is None else (tokens,)), PartitionSpec()
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(heads, heads, new, new, one, one, none, none, new),
                out_specs=(heads, none),
                check_vma=False,
            )
        o_TNW, kv = local(
            q_BTNU[0], q_BTNJ[0], latent_BTC[0], rope_BTJ[0], k_b_NUC, v_b_NCW, kv,
            jnp.asarray(layer), own,
        )  # fmt: skip
        return o_TNW[None], kv

    return attend
