"""The shapes that tests, the compile gate, benchmarks and tuning all run; see
pallas_kernels/cases.py for the names."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import Work
from pallas_kernels.devices import Device, Impl
from pallas_kernels.mla_attention import Pages, Ragged, choose, write_and_attend
from pallas_kernels.mla_attention.layout import FP8
from pallas_kernels.mla_attention.layout import tuning_key as key_of

UNREAD = 1e4  # what every slot holds that nobody may read; 8-bit caches hold at most 448
LAYERS, LAYER = 2, 1  # of the cache, and the one that is used
DONATED = (4,)  # the pages among `inputs`: a step updates them in place
BF16 = jnp.dtype(jnp.bfloat16)
F16 = jnp.dtype(jnp.float16)
F32 = jnp.dtype(jnp.float32)


class Case(NamedTuple):
    name: str
    queries: tuple[int, ...]  # of each row; the leading ones are decode rows
    cached: tuple[int, ...]  # tokens of each row before this step
    N: int  # query heads
    S: int = 64  # tokens per page
    C: int = 512  # latent_dim
    H: int = 64  # rope_dim
    empty: tuple[int, ...] = ()  # rows that are skipped
    padding: int = 0  # tokens and rows beside those
    spare: int = 0  # pages that no row holds: a pool is larger than any memory on a chip
    dtype: Any = BF16
    kv_dtype: Any = None  # None: dtype
    parts: int | None = None  # of the GPU kernel's work; None: its own choice
    unit_pages: int | None = 2


# Any page size and latent_dim, float32: what only the reference takes.
CPU_CASES = tuple(c._replace(dtype=F32) for c in (
    Case("one", (1,), (0,), N=4, C=16, H=8, S=4),
    Case("many", (1,) * 19, tuple(range(0, 19 * 23, 23)), N=3, C=16, H=8, S=8, padding=5),
    Case("chunk", (33,), (150,), N=4, C=16, H=4, S=16, padding=7),
    Case("chunks", (70, 3, 12), (0, 130, 9), N=4, C=32, H=8, S=4, padding=3),
    Case("both", (1, 1, 40, 17), (99, 300, 0, 21), N=8, C=16, H=8, S=16, padding=5),
    Case("page_of_one", (1, 9), (11, 3), N=4, C=16, H=8, S=1),
    Case("eight_bits", (1, 20), (30, 10), N=4, C=16, H=8, S=8, kv_dtype=FP8),
))  # fmt: skip

# Small, and every feature and edge of the kernels.
KERNEL_CASES = (
    Case("decode", (1, 1, 1), (5, 200, 63), N=16, C=128, padding=1, parts=2),
    Case("first_token", (1,), (0,), N=16, C=128, parts=1),
    Case("full", (1, 1), (64, 300), N=16, parts=2),
    Case("two_tiles", (1, 1), (100, 300), N=128, C=128, parts=2),
    Case("whole_tile", (1,), (127,), N=64, C=128, parts=1),
    Case("cut_often", (1, 1), (900, 30), N=8, C=128, parts=5),
    Case("skipped", (1, 1, 1), (70, 5, 100), N=32, C=256, empty=(1,), padding=1, parts=2),
    Case("heads_12", (1, 5), (90, 60), N=12, C=128, parts=2),
    Case("half", (1,), (90,), N=16, C=128, parts=1, dtype=F16),
    Case("prefill", (70,), (0,), N=16, C=128, parts=3),
    Case("prefill_chunks", (30, 3), (150, 9), N=64, C=128, padding=3, parts=4),
    Case("prefill_two_tiles", (3,), (150,), N=128, C=128, parts=2),
    Case("decode_and_chunks", (1, 1, 20, 7), (99, 260, 0, 21), N=16, C=128, padding=5, parts=3),
    Case("fp8_pages", (1, 1, 20), (90, 3, 60), N=16, C=128, kv_dtype=FP8, padding=1),
)  # fmt: skip
CASES = (*CPU_CASES, *KERNEL_CASES)


def _decode(model: str, N: int, **options) -> tuple[Case, ...]:
    return tuple(
        Case(f"{model}_decode_{rows}x{length // 1024}k", (1,) * rows, (length - 1,) * rows, N=N,
             **options)
        for rows, length in ((1, 32768), (64, 4096), (64, 32768), (256, 4096))
    )  # fmt: skip


# V2-Lite on one device has the shapes of V3's eighth, and so its cases.
MODEL_CASES = (
    *_decode("deepseek_v3", N=128),
    *_decode("deepseek_v3_tp8", N=16),
    Case("deepseek_v3_prefill_2k", (2048,), (6144,), N=128, spare=4096),
    Case("deepseek_v3_tp8_prefill_2k", (2048,), (6144,), N=16, spare=4096),
    Case("deepseek_v3_tp8_both", (1,) * 63 + (1985,), (8191,) * 63 + (6207,), N=16),
    Case("deepseek_v3_tp8_fp8_64x32k", (1,) * 64, (32767,) * 64, N=16, kv_dtype=FP8),
)


def num_decodes(case: Case) -> int:
    """The leading rows with one query."""
    return next((i for i, n in enumerate(case.queries) if n != 1), len(case.queries))


def decode_only(case: Case) -> bool:
    return num_decodes(case) == len(case.queries)


def num_tokens(case: Case) -> int:
    """Of the step, without padding."""
    return sum(case.queries)


def impls(case: Case, device: Device) -> tuple[Impl, ...]:
    if case.dtype == F32:
        return ("reference",)
    dtype = case.kv_dtype or case.dtype
    return (choose(device, page_size=case.S, latent_dim=case.C, rope_dim=case.H, dtype=dtype),)


class Layout(NamedTuple):
    """Where a case's tokens lie: pages shuffled, page 0 the padding's."""

    page_T: np.ndarray
    slot_T: np.ndarray
    ragged: Ragged
    readable_PS: np.ndarray  # slots that hold an earlier token of some row


def layout(case: Case) -> Layout:
    rng = np.random.default_rng(0)
    rows, pad = len(case.queries), case.padding
    lengths = [q + c for q, c in zip(case.queries, case.cached, strict=True)]
    per_row = [-(-n // case.S) for n in lengths]
    M, total = max(per_row) + 1, sum(per_row)
    pool = total + case.spare + 1
    order = rng.permutation(total) + 1
    pages = rng.integers(0, total + 1, (rows + pad, M)).astype(np.int32)
    taken = np.cumsum([0, *per_row])
    readable = np.zeros((pool, case.S), bool)
    page_T, slot_T = np.zeros((2, num_tokens(case) + pad), np.int32)
    t = 0
    for r, (n, old) in enumerate(zip(lengths, case.cached, strict=True)):
        pages[r, : per_row[r]] = order[taken[r] : taken[r + 1]]
        pos = np.arange(n)
        page, slot = pages[r, pos // case.S], pos % case.S
        readable[page[:old], slot[:old]] = True
        if r not in case.empty:
            page_T[t : t + n - old], slot_T[t : t + n - old] = page[old:], slot[old:]
        t += n - old
    lengths = [0 if r in case.empty else n for r, n in enumerate(lengths)]
    fields: tuple[Any, ...] = (
        pages,
        np.asarray(lengths + [0] * pad, np.int32),
        np.cumsum([0, *case.queries] + [0] * pad).astype(np.int32),
        np.int32(num_decodes(case)),
        np.int32(rows),
    )
    ragged = Ragged(*fields)
    return Layout(page_T, slot_T, ragged, readable)


def inputs(case: Case, key: jax.Array, impl: Impl) -> tuple:
    """(q, q's rope part, latent, rope, pages, layer, page_T, slot_T, ragged, kv_scale)."""
    return jax.jit(_inputs, static_argnums=(0, 2))(case, key, impl)


def _inputs(case: Case, key: jax.Array, impl: Impl) -> tuple:
    where = layout(case)
    kv_dtype = case.kv_dtype or case.dtype
    T, (P, S), D = len(where.page_T), where.readable_PS.shape, case.C + case.H
    q, qr, c, r, kv, scale = jax.random.split(key, 6)
    # Of 16 bits, jax.random.normal ends at 2.7.
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(case.dtype)
    unread = min(UNREAD, float(jnp.finfo(kv_dtype).max))
    readable_1PS1 = jnp.asarray(where.readable_PS)[None, :, :, None]
    kv_LPSD = jax.random.normal(kv, (LAYERS, P, S, D)).astype(jnp.bfloat16)
    kv_LPSD = jnp.where(readable_1PS1, kv_LPSD, jnp.bfloat16(unread)).astype(kv_dtype)
    if impl == "mosaic_tpu":
        kv_LPSD = jnp.pad(kv_LPSD, ((0, 0), (0, 0), (0, 0), (0, -D % 128)))
    kv_scale = jax.random.uniform(scale, minval=0.5, maxval=1.5) if kv_dtype == FP8 else None
    return (
        normal(q, T, case.N, case.C), normal(qr, T, case.N, case.H),
        normal(c, T, case.C), normal(r, T, case.H), Pages(kv_LPSD), jnp.int32(LAYER),
        jnp.asarray(where.page_T), jnp.asarray(where.slot_T),
        jax.tree.map(jnp.asarray, where.ragged), kv_scale,
    )  # fmt: skip


def call(
    case: Case, impl: Impl, device: Device, *, interpret: Any = False, tiles: Any = None
):  # fmt: skip
    """The step on `inputs`: (o_TNC, pages)."""
    if tiles is None and impl == "mosaic_gpu" and case.parts is not None:
        from pallas_kernels.mla_attention.mosaic_gpu import Tiles

        tiles = Tiles(case.parts, case.unit_pages)

    def run(q, q_rope, latent, rope, pages, layer, page_T, slot_T, ragged, kv_scale):
        return write_and_attend(
            q, q_rope, latent, rope, pages, layer, page_T, slot_T, ragged,
            scale=(128 + 64) ** -0.5, kv_scale=kv_scale, tiles=tiles,
            decode_only=decode_only(case),
            device=device, impl=impl, interpret=interpret,
        )  # fmt: skip

    return run


def tuning_key(case: Case, device: Device) -> str:
    del device
    where = layout(case)
    T, M = len(where.page_T), where.ragged.pages_RM.shape[1]
    of = lambda *shape, dtype=case.dtype: jax.ShapeDtypeStruct(shape, dtype)
    return key_of(
        of(T, case.N, case.C), of(T, case.N, case.H),
        of(LAYERS, 1, case.S, case.C + case.H, dtype=case.kv_dtype or case.dtype), M,
        decode_only(case),
    )  # fmt: skip


def candidates(case: Case, device: Device) -> list:
    """Tiles worth timing, the kernel's own choice first."""
    impl = impls(case, device)[0]
    if impl == "mosaic_gpu":
        from pallas_kernels.mla_attention import mosaic_gpu

        where = layout(case)
        T, M = len(where.page_T), where.ragged.pages_RM.shape[1]
        return mosaic_gpu.candidates(T, case.N, case.C, M, decode_only(case), device)
    if impl == "mosaic_tpu":
        from pallas_kernels.mla_attention import mosaic_tpu

        return mosaic_tpu.candidates(case.N, case.C, decode_only(case), device)
    return []


def comparable(case: Case, output: tuple) -> tuple:
    """What every implementation must agree on: the real tokens' outputs, and the cache but for
    page 0, float32, with unread slots zeroed."""
    o_TNC, pages = output
    where = layout(case)
    used = where.readable_PS.copy()
    used[where.page_T, where.slot_T] = True
    used[0] = False
    used = jnp.asarray(used)[None, :, :, None]
    kv_LPSD = pages.kv_LPSD[..., : case.C + case.H].astype(jnp.float32)
    start_R = where.ragged.start_R
    alive = np.ones(num_tokens(case), bool)
    for r in case.empty:
        alive[start_R[r] : start_R[r + 1]] = False
    return o_TNC[: num_tokens(case)][alive], jnp.where(used, kv_LPSD, 0.0)


def seen(case: Case) -> int:
    """Pairs of a query and a cached token that it sees."""
    return sum(
        new * old + new * (new + 1) // 2
        for r, (new, old) in enumerate(zip(case.queries, case.cached, strict=True))
        if r not in case.empty
    )


def work(case: Case) -> Work:
    one = (case.C + case.H) * jnp.dtype(case.kv_dtype or case.dtype).itemsize  # a cached token
    read = sum(new + old for new, old in zip(case.queries, case.cached, strict=True))
    size, tokens = jnp.dtype(case.dtype).itemsize, num_tokens(case)
    row = 2 * case.C + case.H  # q and o of a head
    return Work(
        flops=2 * case.N * row * seen(case),
        # the rows' cached tokens; q, latent and rope in; o out; latent and rope written
        bytes=one * (read + tokens) + size * tokens * (case.N * row + case.C + case.H),
        # a layer of the cache; what prefill may hold of the queries is larger than a small one
        forbidden_bytes=one * layout(case).readable_PS.size if decode_only(case) else None,
    )
