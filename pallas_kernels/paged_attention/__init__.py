"""Attention over a paged KV cache, for ragged batches of prefill chunks and decode rows.

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
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.layout import (
    FP8,
    PackedPages,
    Pages,
    Ragged,
    Scales,
    in_parts,
)
from pallas_kernels.paged_attention.tiles import PhaseTiles
from pallas_kernels.reach import check_chunk_size

__all__ = [
    "Impl", "PackedPages", "Pages", "PhaseTiles", "Ragged", "Scales", "attend", "cache_shapes",
    "choose", "heads_axis", "in_parts", "write", "write_and_attend",
]  # fmt: skip

IMPLS: tuple[Impl, ...] = ("reference", "mosaic_gpu", "mosaic_tpu")
QUERY_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
FOREVER = 2**30  # a window that never ends


def choose(
    device: Device, *, page_size: int, head_dim: int, dtype: Any, distance_bias: bool = False,
    apart: bool = False,
) -> Impl:  # fmt: skip
    """What the op runs on `device` with a cache of these pages: the device's kernel if that takes
    them, else the reference. `distance_bias`: scores gain one; `apart`: `attend` is called
    too."""
    impl = mosaic(device)
    asked = {"distance_bias": distance_bias, "apart": apart}
    refused = refusal(impl, page_size=page_size, head_dim=head_dim, dtype=dtype, **asked)
    return "reference" if refused else impl


def refusal(
    impl: Impl, *, page_size: int, head_dim: int, dtype: Any, distance_bias: bool = False,
    apart: bool = False,
) -> str | None:  # fmt: skip
    """Why `impl` does not do what `choose` would be asked for; None: it does."""
    if impl == "reference":
        return None
    asked = {"distance_bias": distance_bias, "apart": apart}
    return _kernel(impl).refuse(page_size=page_size, head_dim=head_dim, dtype=dtype, **asked)


def cache_shapes(
    impl: Impl,
    *,
    num_layers: int,
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: Any,
) -> Pages | PackedPages:
    """The cache that `impl` reads, as jax.ShapeDtypeStructs."""
    checks.check_one_of("impl", impl, IMPLS)
    shape = (num_layers, num_pages, num_kv_heads, page_size, head_dim)
    _refuse(impl, page_size=page_size, head_dim=head_dim, dtype=dtype)
    if impl == "mosaic_tpu":
        packed = _kernel(impl).cache_shape(
            num_layers=num_layers, num_pages=num_pages, num_kv_heads=num_kv_heads,
            page_size=page_size, head_dim=head_dim, dtype=dtype,
        )  # fmt: skip
        return PackedPages(jax.ShapeDtypeStruct(packed, dtype))
    one = jax.ShapeDtypeStruct(shape, dtype)
    return Pages(one, one)


def heads_axis(impl: Impl) -> int:
    """The axis of the cache's arrays that tensor parallelism splits."""
    checks.check_one_of("impl", impl, IMPLS)
    return {"reference": 2, "mosaic_gpu": 2, "mosaic_tpu": 3}[impl]


def write_and_attend(
    q_TNH: Float[Array, "T N H"],
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    pages: Pages | PackedPages,
    layer: int | Int[Array, ""],
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    ragged: Ragged,
    *,
    window: int | Int[Array, ""],
    attention_chunk_size: int | None = None,
    scale: float,
    decode_only: bool,
    softcap: float | None = None,
    sinks_N: Float[Array, " N"] | None = None,
    alibi_N: Float[Array, " N"] | None = None,
    distance_bias_NX: Float[Array, "N X"] | None = None,
    kv_scales: Scales | None = None,
    device: Device,
    impl: Impl | None = None,
    tiles: PhaseTiles | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "T N H"], Pages | PackedPages]:
    """Write k and v of the step's tokens into `layer` of the cache, then attend to it.

    Token t goes to page page_T[t], slot slot_T[t]; padding tokens go to a page nobody reads.
    Each query sees the `window` latest tokens up to itself, of those the ones of its own chunk
    where each row's tokens, from its first, are cut into chunks of `attention_chunk_size`. A score
    is `scale` times q·k, in float32, then softcap * tanh(score / softcap), then plus
    alibi_N[n] * (key position - query position), and with X = 2 M + 1 distance_bias_NX[n, M + d],
    d being key position - query position, cut to -M and M; exp(sinks_N[n]) joins the softmax's
    denominator. Kernels take no distance_bias_NX.
    `decode_only` promises that every row has one query, token r being row r's.

    `pages` has the shapes of `cache_shapes(impl, ...)`, in q's dtype or float8_e4m3fn; an 8-bit
    cache holds value / kv_scales, cut to ±448. It is updated in place when its buffers are
    donated. Outputs of padding tokens are finite and meaningless.

    `impl` None is `choose(device, ...)`; a named one never falls back to another. `tiles` replace
    a kernel's own choice. Raises ValueError, naming the argument, for what does not fit or what
    `impl` does not take.
    """
    cache, biased = _described(pages, q_TNH.shape[-1]), distance_bias_NX is not None
    dtype = cache["dtype"]
    if impl is None:
        impl = choose(device, **cache, distance_bias=biased)
    checks.check_one_of("impl", impl, IMPLS)
    K = k_TKH.shape[1]
    _check_new(q_TNH, k_TKH, v_TKH, page_T, slot_T)
    _check_step(q_TNH, K, ragged, decode_only)
    _check_options(q_TNH, K, dtype, scale, softcap, sinks_N, alibi_N, distance_bias_NX, kv_scales)
    check_chunk_size(attention_chunk_size)
    _check_pages(impl, pages, K, q_TNH.shape[2])
    _check_places(pages, page_T, slot_T)
    _check_table(pages, ragged)
    options: dict[str, Any] = {
        "window": window, "attention_chunk_size": attention_chunk_size, "scale": scale,
        "decode_only": decode_only, "softcap": softcap, "sinks_N": sinks_N, "alibi_N": alibi_N,
        "kv_scales": kv_scales,
    }  # fmt: skip
    if impl == "reference" and isinstance(pages, Pages):  # _check_pages saw to that
        pages = Pages(*reference.write(k_TKH, v_TKH, *pages, layer, page_T, slot_T, kv_scales))
        options["distance_bias_NX"] = distance_bias_NX
        return reference.attend(q_TNH, *pages, layer, *ragged, **options), pages
    _refuse(impl, **cache, distance_bias=biased)
    return _kernel(impl).write_and_attend(
        q_TNH, k_TKH, v_TKH, pages, layer, page_T, slot_T, ragged,
        **options, device=device, tiles=tiles or PhaseTiles(None, None), interpret=interpret,
    )  # fmt: skip


def write(
    k_TKH: Float[Array, "T K H"],
    v_TKH: Float[Array, "T K H"],
    pages: Pages | PackedPages,
    layer: int | Int[Array, ""],
    page_T: Int[Array, " T"],
    slot_T: Int[Array, " T"],
    *,
    kv_scales: Scales | None = None,
    device: Device,
    impl: Impl | None = None,
) -> Pages | PackedPages:
    """What `write_and_attend` writes, and nothing else."""
    cache, K = _described(pages, k_TKH.shape[-1]), k_TKH.shape[1]
    impl = impl or choose(device, **cache)
    checks.check_one_of("impl", impl, IMPLS)
    _refuse(impl, **cache)
    _check_new(k_TKH, k_TKH, v_TKH, page_T, slot_T)
    _check_options(k_TKH, K, cache["dtype"], 1.0, None, None, None, None, kv_scales)
    _check_pages(impl, pages, K, k_TKH.shape[2])
    _check_places(pages, page_T, slot_T)
    if impl == "reference" and isinstance(pages, Pages):  # _check_pages saw to that
        return Pages(*reference.write(k_TKH, v_TKH, *pages, layer, page_T, slot_T, kv_scales))
    return _kernel(impl).write(k_TKH, v_TKH, pages, layer, page_T, slot_T, kv_scales)


def attend(
    q_TNH: Float[Array, "T N H"],
    pages: Pages,
    layer: int | Int[Array, ""],
    ragged: Ragged,
    *,
    scale: float,
    decode_only: bool,
    device: Device,
    impl: Impl | None = None,
    interpret: Any = False,
) -> Float[Array, "T N H"]:
    """As `write_and_attend`, of a cache in q's dtype that holds every key already, the queries'
    own or others': a row's queries are the last of its kv_len_R tokens, as ever, and see all that
    come before."""
    cache, K = _described(pages, q_TNH.shape[-1]), pages.k_LPKSH.shape[2]
    impl = impl or choose(device, **cache, apart=True)
    checks.check_one_of("impl", impl, IMPLS)
    _refuse(impl, **cache, apart=True)
    _check_step(q_TNH, K, ragged, decode_only)
    _check_options(q_TNH, K, cache["dtype"], scale, None, None, None, None, None)
    checks.check_dtype("q_TNH", q_TNH, (cache["dtype"],))
    _check_pages(impl, pages, K, q_TNH.shape[2])
    _check_table(pages, ragged)
    if impl == "reference":
        how = {"window": FOREVER, "scale": scale, "decode_only": decode_only}
        return reference.attend(q_TNH, *pages, layer, *ragged, **how)
    return _kernel(impl).attend(
        q_TNH, pages, layer, ragged, window=FOREVER, attention_chunk_size=None, scale=scale,
        decode_only=decode_only, softcap=None, sinks_N=None, alibi_N=None, kv_scales=None,
        device=device, interpret=interpret, tiles=PhaseTiles(None, None),
    )  # fmt: skip


def _described(pages: Pages | PackedPages, head_dim: int) -> dict[str, Any]:
    """The cache as `choose` is asked about it."""
    dtype = jax.tree.leaves(pages)[0].dtype
    return {"page_size": _page_size(pages), "head_dim": head_dim, "dtype": dtype}


def _page_size(pages: Pages | PackedPages) -> int:
    is_packed = isinstance(pages, PackedPages)
    return pages.kv_LPSCpH.shape[2] if is_packed else pages.k_LPKSH.shape[-2]


def _kernel(impl: Impl) -> ModuleType:
    # Pallas takes a third of a second to import, and the reference needs none of it.
    return import_module(f"pallas_kernels.paged_attention.{impl}")


def _refuse(impl: Impl, **cache: Any) -> None:
    if why := refusal(impl, **cache):
        raise ValueError(f"impl {impl} does not take this cache: {why}")


def _check_new(q_TNH, k_TKH, v_TKH, page_T, slot_T) -> None:
    checks.check_rank("q_TNH", q_TNH, 3)
    checks.check_rank("k_TKH", k_TKH, 3)
    (T, _, H), K = q_TNH.shape, k_TKH.shape[1]
    checks.check_shape("k_TKH", k_TKH, (T, K, H), why="tokens and head_dim are those of q_TNH")
    checks.check_shape("v_TKH", v_TKH, (T, K, H), why="it is shaped like k_TKH")
    for name, x in (("page_T", page_T), ("slot_T", slot_T)):
        checks.check_shape(name, x, (T,), why="one for each token of q_TNH")


def _check_step(q_TNH, K: int, ragged: Ragged, decode_only: bool) -> None:
    checks.check_rank("q_TNH", q_TNH, 3)
    checks.check_dtype("q_TNH", q_TNH, QUERY_DTYPES)
    T, N, _ = q_TNH.shape
    checks.check_multiple("N of q_TNH", N, K, why="every kv head serves as many query heads")
    checks.check_rank("pages_RM", ragged.pages_RM, 2)
    R = ragged.pages_RM.shape[0]
    checks.check_shape("kv_len_R", ragged.kv_len_R, (R,), why="one for each row of pages_RM")
    checks.check_shape("start_R", ragged.start_R, (R + 1,), why="one more than rows of pages_RM")
    if decode_only and T != R:
        raise ValueError(f"decode_only is True for {T} tokens in {R} rows; each row has one query")


def _check_options(
    q_TNH, K, dtype, scale, softcap, sinks_N, alibi_N, distance_bias_NX, kv_scales
) -> None:
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be positive")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for none")
    for name, x in (("sinks_N", sinks_N), ("alibi_N", alibi_N)):
        if x is not None:
            checks.check_shape(name, x, (q_TNH.shape[1],), why="one for each query head")
            checks.check_dtype(name, x, (jnp.float32,))
    if distance_bias_NX is not None:
        checks.check_distance_bias(distance_bias_NX, q_TNH.shape[1])
    if dtype not in (q_TNH.dtype, FP8):
        raise ValueError(f"pages are {dtype}; they must be {q_TNH.dtype}, as q_TNH, or {FP8}")
    if kv_scales is not None:
        if dtype != FP8:
            raise ValueError(f"kv_scales are given, but pages are {dtype}; only {FP8} has scales")
        for name, x in zip(("kv_scales.k_K", "kv_scales.v_K"), kv_scales, strict=True):
            checks.check_shape(name, x, (K,), why="one for each kv head")
            checks.check_dtype(name, x, (jnp.float32,))


def _check_places(pages, page_T, slot_T) -> None:
    num_pages, page_size = jax.tree.leaves(pages)[0].shape[1], _page_size(pages)
    checks.check_below("page_T", page_T, num_pages, why="pages there are")
    checks.check_below("slot_T", slot_T, page_size, why="slots a page has")


def _check_table(pages, ragged: Ragged) -> None:
    num_pages = jax.tree.leaves(pages)[0].shape[1]
    checks.check_below("pages_RM", ragged.pages_RM, num_pages, why="pages there are")


def _check_pages(impl: Impl, pages, K: int, head_dim: int) -> None:
    if impl == "mosaic_tpu":
        if not isinstance(pages, PackedPages):
            raise ValueError(f"pages is {type(pages).__name__}; impl {impl} takes PackedPages")
        L, P, S = pages.kv_LPSCpH.shape[:3]
        dtype = pages.kv_LPSCpH.dtype
    else:
        if not isinstance(pages, Pages):
            raise ValueError(f"pages is {type(pages).__name__}; impl {impl} takes Pages")
        checks.check_rank("pages.k_LPKSH", pages.k_LPKSH, 5)
        L, P, _, S, _ = pages.k_LPKSH.shape
        dtype = pages.k_LPKSH.dtype
    want = cache_shapes(
        impl, num_layers=L, num_pages=P, num_kv_heads=K, page_size=S, head_dim=head_dim,
        dtype=dtype,
    )  # fmt: skip
    for name, x, w in zip(pages._fields, pages, want, strict=True):
        checks.check_shape(f"pages.{name}", x, w.shape, why="the cache_shapes of k_TKH and q_TNH")
        checks.check_dtype(f"pages.{name}", x, (w.dtype,))
