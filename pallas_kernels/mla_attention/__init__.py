"""Latent attention (DeepSeek's MLA, kv_b absorbed) over a paged cache of latents, for ragged
batches of prefill chunks and decode rows.

The axes' letters and the cache's layouts are in layout.py.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from pallas_kernels.devices import Device, Impl, mosaic
from pallas_kernels.mla_attention import reference
from pallas_kernels.mla_attention.layout import FP8, LANES, Pages
from pallas_kernels.paged_attention import Ragged

__all__ = ["Impl", "Pages", "Ragged", "cache_shapes", "choose", "write", "write_and_attend"]

IMPLS: tuple[Impl, ...] = ("reference", "mosaic_gpu", "mosaic_tpu")
QUERY_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def choose(device: Device, *, page_size: int, latent_dim: int, rope_dim: int, dtype: Any) -> Impl:
    """What the op runs on `device` with a cache of these pages: the device's kernel if that takes
    them, else the reference."""
    impl = mosaic(device)
    cache = {"latent_dim": latent_dim, "rope_dim": rope_dim, "dtype": dtype}
    if impl == "reference" or _kernel(impl).refuse(page_size=page_size, **cache):
        return "reference"
    return impl


def cache_shapes(
    impl: Impl,
    *,
    num_layers: int,
    num_pages: int,
    page_size: int,
    latent_dim: int,
    rope_dim: int,
    dtype: Any,
) -> Pages:
    """The cache that `impl` reads, as jax.ShapeDtypeStructs."""
    checks.check_one_of("impl", impl, IMPLS)
    width = latent_dim + rope_dim
    if impl != "reference":
        _refuse(impl, page_size=page_size, latent_dim=latent_dim, rope_dim=rope_dim, dtype=dtype)
    if impl == "mosaic_tpu":
        width = -(-width // LANES) * LANES
    return Pages(jax.ShapeDtypeStruct((num_layers, num_pages, page_size, width), dtype))


def write(
    latent_TC: Float[Array, "T C"],
    rope_TH: Float[Array, "T H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    *,
    kv_scale: Float[Array, ""] | None = None,
) -> Pages:
    """What `write_and_attend` writes, whatever its impl, and nothing else."""
    filled = pages.kv_LPSD.shape[3] - latent_TC.shape[1]
    rope_TH = jnp.pad(rope_TH, ((0, 0), (0, filled - rope_TH.shape[1])))
    return Pages(
        reference.write(latent_TC, rope_TH, pages.kv_LPSD, layer, page_T, slot_T, kv_scale)
    )


def write_and_attend(
    q_TNC: Float[Array, "T N C"],
    q_TNH: Float[Array, "T N H"],
    latent_TC: Float[Array, "T C"],
    rope_TH: Float[Array, "T H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    ragged: Ragged,
    *,
    scale: float,
    decode_only: bool,
    kv_scale: Float[Array, ""] | None = None,
    device: Device,
    impl: Impl | None = None,
    tiles: Any = None,
    interpret: Any = False,
) -> tuple[Float[Array, "T N C"], Pages]:
    """Write latent and rope of the step's tokens into `layer` of the cache, then attend to it.

    Token t goes to page page_T[t], slot slot_T[t]; padding tokens go to a page nobody reads.
    Every query head attends to the same tokens: a score is `scale` times q_TNC·latent +
    q_TNH·rope, and the output is the softmax's average of the latents, in float32.
    `decode_only` promises that every row has one query, token r being row r's. Where slots past a
    row's length are in one of its pages, they hold finite numbers.

    `pages` has the shapes of `cache_shapes(impl, ...)`, in q's dtype or float8_e4m3fn; an 8-bit
    cache holds value / kv_scale (None: 1), cut to ±448. It is updated in place when its buffer is
    donated. Outputs of padding tokens are finite and meaningless.

    `impl` None is `choose(device, ...)`; a named one never falls back to another. `tiles` are the
    kernel's Tiles, None for its own choice. Raises ValueError, naming the argument, for what does
    not fit or what `impl` does not take.
    """
    _check_step(q_TNC, q_TNH, latent_TC, rope_TH, page_T, slot_T, ragged, decode_only)
    checks.check_rank("pages.kv_LPSD", pages.kv_LPSD, 4)
    L, P, S, _ = pages.kv_LPSD.shape
    cache = {
        "page_size": S, "latent_dim": q_TNC.shape[2], "rope_dim": q_TNH.shape[2],
        "dtype": pages.kv_LPSD.dtype,
    }  # fmt: skip
    impl = impl or choose(device, **cache)
    checks.check_one_of("impl", impl, IMPLS)
    if cache["dtype"] not in (q_TNC.dtype, FP8):
        dtypes = f"{q_TNC.dtype}, as q_TNC, or {FP8}"
        raise ValueError(f"pages.kv_LPSD is {cache['dtype']}; it must be {dtypes}")
    if kv_scale is not None and cache["dtype"] != FP8:
        raise ValueError(f"kv_scale is given, but pages are {cache['dtype']}; only {FP8} has one")
    want = cache_shapes(impl, num_layers=L, num_pages=P, **cache).kv_LPSD
    checks.check_shape(
        "pages.kv_LPSD", pages.kv_LPSD, want.shape, why=f"the cache_shapes of {impl}"
    )
    checks.check_below("page_T", page_T, P, why="pages there are")
    checks.check_below("slot_T", slot_T, S, why="slots a page has")
    checks.check_below("pages_RM", ragged.pages_RM, P, why="pages there are")
    if impl == "reference":
        kv_LPSD = reference.write(
            latent_TC, rope_TH, pages.kv_LPSD, layer, page_T, slot_T, kv_scale
        )
        o_TNC = reference.attend(
            q_TNC, q_TNH, kv_LPSD, layer, *ragged,
            scale=scale, decode_only=decode_only, kv_scale=kv_scale,
        )  # fmt: skip
        return o_TNC, Pages(kv_LPSD)
    return _kernel(impl).write_and_attend(
        q_TNC, q_TNH, latent_TC, rope_TH, pages, layer, page_T, slot_T, ragged,
        scale=scale, decode_only=decode_only, kv_scale=kv_scale, device=device, chosen=tiles,
        interpret=interpret,
    )  # fmt: skip


def _kernel(impl: Impl) -> ModuleType:
    # Pallas takes a third of a second to import, and the reference needs none of it.
    return import_module(f"pallas_kernels.mla_attention.{impl}")


def _refuse(impl: Impl, **cache: Any) -> None:
    if why := _kernel(impl).refuse(**cache):
        raise ValueError(f"impl {impl} does not take this cache: {why}")


def _check_step(
    q_TNC, q_TNH, latent_TC, rope_TH, page_T, slot_T, ragged: Ragged, decode_only: bool
) -> None:
    for name, x in (("q_TNC", q_TNC), ("q_TNH", q_TNH)):
        checks.check_rank(name, x, 3)
        checks.check_dtype(name, x, QUERY_DTYPES)
    (T, N, C), H = q_TNC.shape, q_TNH.shape[2]
    checks.check_shape("q_TNH", q_TNH, (T, N, H), why="tokens and heads are those of q_TNC")
    if q_TNH.dtype != q_TNC.dtype:
        raise ValueError(f"q_TNH is {q_TNH.dtype}; it must be {q_TNC.dtype}, as q_TNC")
    checks.check_shape("latent_TC", latent_TC, (T, C), why="tokens and latent_dim are q_TNC's")
    checks.check_shape("rope_TH", rope_TH, (T, H), why="tokens and rope_dim are q_TNH's")
    for name, x in (("page_T", page_T), ("slot_T", slot_T)):
        checks.check_shape(name, x, (T,), why="one for each token of q_TNC")
    checks.check_rank("pages_RM", ragged.pages_RM, 2)
    R = ragged.pages_RM.shape[0]
    checks.check_shape("kv_len_R", ragged.kv_len_R, (R,), why="one for each row of pages_RM")
    checks.check_shape("start_R", ragged.start_R, (R + 1,), why="one more than rows of pages_RM")
    if decode_only and T != R:
        raise ValueError(f"decode_only is True for {T} tokens in {R} rows; each row has one query")
