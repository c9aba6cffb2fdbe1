"""The seam between a model and its cache, and the paged cache behind it.

A module computes q, k and v and hands them to `attend`; whether that is dense attention over
the tokens at hand or a paged cache is the caller's business, so a researcher's forward and the
engine run the very same module.

A page holds the keys and values of `page_size` consecutive tokens of one sequence, for all
layers. Page 0 belongs to nobody: padding is written there and never read.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from pallas_kernels.paged_attention import Impl, Pages, Ragged, write_and_attend

KV = Any  # the cache, a pytree threaded through the layers; None without one
FULL = 2**30  # a window that never ends
PADDING_PAGE = 0
TENSOR_AXIS = "tensor"  # of the mesh: heads, and with them the cache, are split over it


@runtime_checkable
class Attend(Protocol):
    """Causal attention of each token to itself and the earlier tokens of its sequence.

    q [B, T, N, H], k and v [B, T, K, H] -> o [B, T, N, H] and the cache with k and v in it.
    `layer` is the layer's index, `window` the number of tokens a query sees (itself included),
    both Python or traced integers; `scale` multiplies q·k.
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
        scale: float,
    ) -> tuple[Array, KV]: ...


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    num_layers: int
    num_pages: int
    num_kv_heads: int
    page_size: int  # tokens
    head_dim: int
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the keys; the values' is the same."""
        return (
            self.num_layers, self.num_pages, self.num_kv_heads, self.page_size, self.head_dim,
        )  # fmt: skip

    def page_bytes_per_device(self, mesh: Mesh) -> int:
        """Keys and values of one page, all layers, the heads of one device."""
        heads = self.num_kv_heads // dict(mesh.shape).get(TENSOR_AXIS, 1)
        tokens = self.num_layers * self.page_size
        return 2 * tokens * heads * self.head_dim * jnp.dtype(self.dtype).itemsize

    def with_pages(self, num_pages: int) -> "CacheSpec":
        return replace(self, num_pages=num_pages)

    def abstract(self, mesh: Mesh) -> Pages:
        sharding = NamedSharding(mesh, _by_head(mesh, before=2))
        one = jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=sharding)
        return Pages(one, one)

    def allocate(self, mesh: Mesh) -> Pages:
        """An empty cache, split over the mesh's tensor axis by kv head."""
        sharding = NamedSharding(mesh, _by_head(mesh, before=2))
        make = jax.jit(lambda: jnp.zeros(self.shape, self.dtype), out_shardings=sharding)
        return Pages(make(), make())


def paged_attend(
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    ragged: Ragged,
    mesh: Mesh,
    *,
    decode_only: bool,
    impl: Impl,
) -> Attend:
    """The `attend` over a Pages cache for a step's tokens [1, T]; each device of the mesh's
    tensor axis attends with its own heads."""

    def attend(q_BTNH, k_BTKH, v_BTKH, kv: Pages, *, layer, window, scale):
        def local(q_TNH, k_TKH, v_TKH, kv, layer, window):
            return write_and_attend(
                q_TNH, k_TKH, v_TKH, kv, layer, page_T, slot_T, ragged,
                window=window, scale=scale, decode_only=decode_only, impl=impl,
            )  # fmt: skip

        if mesh.size > 1:
            heads, cache = _by_head(mesh, before=1), _by_head(mesh, before=2)
            kv_specs, none = Pages(cache, cache), PartitionSpec()
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(heads, heads, heads, kv_specs, none, none),
                out_specs=(heads, kv_specs),
                check_vma=False,
            )
        o_TNH, kv = local(
            q_BTNH[0], k_BTKH[0], v_BTKH[0], kv, jnp.asarray(layer), jnp.asarray(window)
        )
        return o_TNH[None], kv

    return attend


def _by_head(mesh: Mesh, *, before: int) -> PartitionSpec:
    """Of an array whose heads come after `before` axes; whole where the mesh has no tensor axis."""
    axis = TENSOR_AXIS if TENSOR_AXIS in mesh.shape else None
    return PartitionSpec(*[None] * before, axis)
