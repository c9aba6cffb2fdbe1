"""The shapes that tests, the compile gate, benchmarks and tuning all run; see
pallas_kernels/cases.py for the names. Add one here, get all four."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cases import Work
from pallas_kernels.devices import Device, Impl
from pallas_kernels.paged_attention import (
    PackedPages,
    Pages,
    PhaseTiles,
    Ragged,
    Scales,
    choose,
    write_and_attend,
)
from pallas_kernels.paged_attention import tiles as tiling
from pallas_kernels.paged_attention.layout import FP8
from pallas_kernels.reach import most

FULL = 2**30  # a window that never ends
UNREAD = 1e4  # what every slot holds that nobody may read; 8-bit caches hold at most 448
LAYERS, LAYER = 2, 1  # of the cache, and the one that is used
CANDIDATES = 12  # tile choices of a case
DONATED = (3,)  # the pages among `inputs`: a step updates them in place
BF16 = jnp.dtype(jnp.bfloat16)
F32 = jnp.dtype(jnp.float32)


class Case(NamedTuple):
    name: str
    queries: tuple[int, ...]  # of each row; the leading ones are decode rows
    cached: tuple[int, ...]  # tokens of each row before this step
    N: int  # query heads
    K: int  # kv heads
    H: int  # head_dim
    S: int  # tokens per page
    window: int = FULL
    attention_chunk_size: int | None = None
    padding: int = 0  # tokens and rows beside those
    softcap: float | None = None
    scale: float | None = None  # None: H ** -0.5
    sinks: bool = False
    alibi: bool = False
    dtype: Any = BF16
    kv_dtype: Any = None  # None: dtype


# Any page size and head_dim, float32: what only the reference takes.
CPU_CASES = tuple(c._replace(dtype=F32) for c in (
    Case("decode_one", (1,), (0,), N=4, K=2, H=16, S=4),
    Case("decode_gqa", (1, 1, 1), (5, 200, 63), N=8, K=2, H=32, S=16, padding=1),
    Case("decode_many", (1,) * 19, tuple(range(0, 19 * 23, 23)), N=4, K=4, H=8, S=8, padding=5),
    Case("decode_mqa", (1, 1), (33, 140), N=8, K=1, H=64, S=64),
    Case("prefill_one", (100,), (0,), N=4, K=2, H=16, S=16),
    Case("prefill_chunk", (33,), (150,), N=4, K=2, H=16, S=16, padding=7),
    Case("prefill_many", (70, 3, 12), (0, 130, 9), N=4, K=4, H=8, S=4, padding=3),
    Case("mixed", (1, 1, 40, 17), (99, 300, 0, 21), N=8, K=4, H=32, S=16, padding=5),
    Case("window", (1, 1, 40), (99, 300, 150), N=4, K=2, H=16, S=8, window=24, padding=2),
    Case("chunked", (1, 1, 70), (98, 299, 150), N=4, K=2, H=16, S=8, attention_chunk_size=32,
         padding=2),
    Case("page_of_one", (1, 9), (11, 3), N=4, K=2, H=8, S=1),
    Case("softcap", (1, 20), (30, 10), N=4, K=2, H=16, S=8, softcap=2.0),
    Case("sinks", (1, 20), (30, 10), N=4, K=2, H=16, S=8, sinks=True, window=16, padding=1),
    Case("alibi", (1, 20), (30, 10), N=4, K=2, H=16, S=8, alibi=True),
    Case("fp8", (1, 20), (30, 10), N=4, K=2, H=16, S=8, kv_dtype=FP8),
))  # fmt: skip

# Small, and every feature and edge of the kernels.
KERNEL_CASES = (
    Case("gqa4", (1, 1, 1), (5, 200, 63), N=8, K=2, H=128, S=64, padding=1),
    Case("mha", (1, 1), (64, 100), N=2, K=2, H=64, S=64),
    Case("mqa", (1, 1), (33, 140), N=8, K=1, H=64, S=64),
    Case("group_of_3", (1, 1), (127, 40), N=6, K=2, H=128, S=64),
    Case("first_token", (1,), (0,), N=4, K=1, H=128, S=64),
    Case("head_dim_80", (1, 20), (90, 60), N=2, K=2, H=80, S=64),
    Case("head_dim_96", (1, 20), (90, 60), N=2, K=1, H=96, S=64),
    Case("head_dim_192", (1, 20), (90, 60), N=2, K=1, H=192, S=64),
    Case("head_dim_256", (1, 20), (90, 60), N=2, K=1, H=256, S=64),
    Case("page_16", (1, 40), (99, 21), N=4, K=1, H=64, S=16),
    Case("page_32", (1, 40), (99, 21), N=4, K=1, H=64, S=32),
    Case("chunks", (70, 3, 130), (0, 130, 9), N=4, K=2, H=64, S=64, padding=3),
    Case("rows_of_both", (1, 1, 40, 17), (99, 300, 0, 21), N=8, K=2, H=64, S=64, padding=5),
    Case("short_window", (1, 1, 40), (99, 300, 150), N=4, K=2, H=64, S=64, window=24, padding=2),
    Case("one_page_window", (1, 90), (300, 150), N=4, K=1, H=64, S=64, window=64),
    Case("chunked", (1, 1, 70), (100, 255, 150), N=4, K=2, H=64, S=64, attention_chunk_size=64,
         padding=1),
    Case("odd_chunks", (1, 70), (300, 150), N=4, K=1, H=64, S=64, attention_chunk_size=100,
         window=70, sinks=True),
    Case("softcapped", (1, 70), (90, 20), N=4, K=2, H=64, S=64, softcap=5.0),
    Case("sunk", (1, 70), (90, 80), N=4, K=2, H=64, S=64, sinks=True, window=50),
    Case("sloped", (1, 70), (90, 20), N=3, K=1, H=64, S=64, alibi=True),
    Case("fp8_pages", (1, 1, 70), (90, 3, 20), N=4, K=2, H=128, S=64, kv_dtype=FP8, padding=1),
    Case("fp8_head_80", (1, 20), (90, 60), N=2, K=1, H=80, S=64, kv_dtype=FP8),
    Case("all_at_once", (1, 70), (200, 90), N=6, K=2, H=128, S=64, window=100,
         attention_chunk_size=128, padding=1, softcap=9.0, sinks=True, alibi=True, kv_dtype=FP8),
)  # fmt: skip
CASES = (*CPU_CASES, *KERNEL_CASES)


def _model(name: str, *, N: int, K: int, H: int, window: int = FULL, **options) -> tuple[Case, ...]:
    """A model's decode of 64 rows (long ones and short ones), its prefill of 8192 tokens, and
    decode rows beside a chunk."""
    shape = {"N": N, "K": K, "H": H, "S": 64, "window": window, **options}
    return (
        Case(f"{name}_decode", (1,) * 64, tuple(range(255, 255 + 64 * 250, 250)), **shape),
        Case(f"{name}_prefill", (8192,), (0,), **shape),
        Case(f"{name}_mixed", (*(1,) * 32, 2048), (*(4095,) * 32, 4096), **shape),
    )


MODEL_CASES = (
    *_model("llama3_8b", N=32, K=8, H=128),
    *_model("llama3_8b_fp8", N=32, K=8, H=128, kv_dtype=FP8),
    *_model("llama3_70b_tp8", N=8, K=1, H=128),
    *_model("qwen3_30b", N=32, K=4, H=128),
    *_model("gemma3_27b", N=32, K=16, H=128, window=1024, scale=168**-0.5),
    *_model("llama4_scout", N=40, K=8, H=128, attention_chunk_size=8192),
    *_model("gpt_oss_120b", N=64, K=8, H=64, window=128, sinks=True),
    Case("llama3_8b_one_long", (1,), (131071,), N=32, K=8, H=128, S=64),
)  # fmt: skip


def num_decodes(case: Case) -> int:
    """The leading rows with one query."""
    return next((i for i, n in enumerate(case.queries) if n != 1), len(case.queries))


def num_tokens(case: Case) -> int:
    """Of the step, without padding."""
    return sum(case.queries)


def phase(case: Case) -> Literal["decode", "prefill"]:
    """Which of the kernel's programs the case is about: decode's where it has no other rows."""
    return "decode" if num_decodes(case) == len(case.queries) else "prefill"


def impls(case: Case, device: Device) -> tuple[Impl, ...]:
    best = choose(device, page_size=case.S, head_dim=case.H, dtype=case.kv_dtype or case.dtype)
    return (best if case.dtype != F32 else "reference",)


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
    order = rng.permutation(total) + 1
    pages = rng.integers(0, total + 1, (rows + pad, M)).astype(np.int32)
    taken = np.cumsum([0, *per_row])
    readable = np.zeros((total + 1, case.S), bool)
    page_T, slot_T = np.zeros((2, num_tokens(case) + pad), np.int32)
    t = 0
    for r, (n, old) in enumerate(zip(lengths, case.cached, strict=True)):
        pages[r, : per_row[r]] = order[taken[r] : taken[r + 1]]
        pos = np.arange(n)
        page, slot = pages[r, pos // case.S], pos % case.S
        readable[page[:old], slot[:old]] = True
        page_T[t : t + n - old], slot_T[t : t + n - old] = page[old:], slot[old:]
        t += n - old
    fields: tuple[Any, ...] = (
        pages,
        np.asarray(lengths + [0] * pad, np.int32),
        np.cumsum([0, *case.queries] + [0] * pad).astype(np.int32),
        np.int32(num_decodes(case)),
        np.int32(rows),
    )
    return Layout(page_T, slot_T, Ragged(*fields), readable)


def inputs(case: Case, key: jax.Array, impl: Impl) -> tuple:
    """(q, k, v, pages, layer, page_T, slot_T, ragged, window, sinks, alibi, kv_scales)."""
    return jax.jit(_inputs, static_argnums=(0, 2))(case, key, impl)


def _inputs(case: Case, key: jax.Array, impl: Impl) -> tuple:
    where = layout(case)
    kv_dtype = case.kv_dtype or case.dtype
    T, (P, S) = len(where.page_T), where.readable_PS.shape
    q, k, v, kc, vc, sink, scale = jax.random.split(key, 7)
    normal = lambda key, *shape: jax.random.normal(key, shape, case.dtype)
    unread = min(UNREAD, float(jnp.finfo(kv_dtype).max))

    def cache(key):
        x = jax.random.normal(key, (LAYERS, P, case.K, S, case.H), jnp.bfloat16)
        readable = jnp.asarray(where.readable_PS)[None, :, None, :, None]
        return jnp.where(readable, x, jnp.bfloat16(unread)).astype(kv_dtype)

    pages: Pages | PackedPages = Pages(cache(kc), cache(vc))
    if impl == "mosaic_tpu":
        from pallas_kernels.paged_attention import mosaic_tpu

        pages = mosaic_tpu.pack(pages)
    sinks = jax.random.normal(sink, (case.N,)) if case.sinks else None
    alibi = 0.5 ** jnp.arange(1.0, case.N + 1) if case.alibi else None
    scales = None
    if kv_dtype == FP8:
        scales = Scales(*jax.random.uniform(scale, (2, case.K), minval=0.5, maxval=1.5))
    return (
        normal(q, T, case.N, case.H), normal(k, T, case.K, case.H), normal(v, T, case.K, case.H),
        pages, jnp.int32(LAYER), jnp.asarray(where.page_T), jnp.asarray(where.slot_T),
        jax.tree.map(jnp.asarray, where.ragged), jnp.int32(case.window), sinks, alibi, scales,
    )  # fmt: skip


def call(
    case: Case, impl: Impl, device: Device, *, interpret: Any = False, tiles: Any = None
):  # fmt: skip
    """The step on `inputs`: (o_TNH, pages). `tiles` are those of the case's `phase`."""
    chosen = None
    if tiles is not None:
        chosen = PhaseTiles(None, None)._replace(**{phase(case): tiles})

    def run(q, k, v, pages, layer, page_T, slot_T, ragged, window, sinks, alibi, kv_scales):
        if impl == "mosaic_tpu" and not interpret:
            window = case.window  # its cost estimate knows the window only where it is static
        return write_and_attend(
            q, k, v, pages, layer, page_T, slot_T, ragged,
            window=window, attention_chunk_size=case.attention_chunk_size,
            scale=case.scale or case.H**-0.5, softcap=case.softcap, sinks_N=sinks, alibi_N=alibi,
            kv_scales=kv_scales, decode_only=phase(case) == "decode",
            device=device, impl=impl, tiles=chosen, interpret=interpret,
        )  # fmt: skip

    return run


def tuning_key(case: Case, device: Device) -> str:
    if device.platform == "tpu":
        from pallas_kernels.paged_attention import mosaic_tpu_tiles

        return mosaic_tpu_tiles.key_of(_tpu_program(case, device), _count(case), _bound(case))
    return tiling.tuning_key(phase(case), _count(case), _shape(case), None)


def candidates(case: Case, device: Device) -> tuple:
    """Tiles worth timing for the case's phase, the kernel's own choice first."""
    impl = impls(case, device)[0]
    if impl == "mosaic_gpu":
        from pallas_kernels.paged_attention import mosaic_gpu_tiles as gpu

        found = gpu.decode_candidates if phase(case) == "decode" else gpu.prefill_candidates
        return found(_shape(case), device)[:CANDIDATES]
    if impl == "mosaic_tpu":
        from pallas_kernels.paged_attention import mosaic_tpu_tiles as tpu

        program = _tpu_program(case, device)
        if phase(case) == "decode":
            return tpu.decode_candidates(program, _bound(case), device)[:CANDIDATES]
        how = (program, _count(case), _bound(case), device)
        return tpu.prefill_candidates(*how)[:CANDIDATES]
    return ()


def _bound(case: Case) -> int:
    return most(case.window, case.attention_chunk_size)


def _count(case: Case) -> int:
    """Of what decides the tiles: rows of a decode, tokens of a prefill; with padding."""
    rows = len(case.queries) if phase(case) == "decode" else num_tokens(case)
    return rows + case.padding


def _shape(case: Case) -> tiling.Shape:
    return tiling.Shape(
        case.N, case.K, case.H, case.S, case.dtype, jnp.dtype(case.kv_dtype or case.dtype)
    )


def _tpu_program(case: Case, device: Device):
    from pallas_kernels.paged_attention import mosaic_tpu

    decode = mosaic_tpu.program(
        N=case.N, K=case.K, H=case.H, S=case.S, M=layout(case).ragged.pages_RM.shape[1],
        cores=device.cores, dtype=case.dtype, kv_dtype=_shape(case).kv_dtype,
        scale=case.scale or case.H**-0.5, attention_chunk_size=case.attention_chunk_size,
        softcap=case.softcap, sinks=case.sinks, alibi=case.alibi,
        kv_scales=case.kv_dtype == FP8, interpret=False,
    )  # fmt: skip
    return decode if phase(case) == "decode" else mosaic_tpu.prefill_of(decode)


def comparable(case: Case, output: tuple) -> tuple:
    """What every implementation must agree on: the real tokens' outputs, and the cache but for
    page 0, float32, with unread slots zeroed."""
    o_TNH, pages = output
    if isinstance(pages, PackedPages):
        from pallas_kernels.paged_attention import mosaic_tpu

        pages = mosaic_tpu.unpack(pages, num_kv_heads=case.K, head_dim=case.H)
    where = layout(case)
    used = where.readable_PS.copy()
    used[where.page_T, where.slot_T] = True
    used[0] = False
    used = jnp.asarray(used)[None, :, None, :, None]
    clean = lambda x: jnp.where(used, x.astype(jnp.float32), 0.0)
    return o_TNH[: num_tokens(case)], clean(pages.k_LPKSH), clean(pages.v_LPKSH)


def seen(case: Case) -> int:
    """Pairs of a query and a key that it sees."""
    total = 0
    for new, old in zip(case.queries, case.cached, strict=True):
        total += int((np.arange(old, old + new) - _oldest(case, old, old + new) + 1).sum())
    return total


def _oldest(case: Case, begin: int, end: int) -> np.ndarray:
    """Of the queries at positions begin to end, the oldest key that each sees."""
    pos_n = np.arange(begin, end)
    size = case.attention_chunk_size
    return np.maximum(pos_n - case.window + 1, 0 if size is None else pos_n // size * size).clip(0)


def work(case: Case) -> Work:
    kv_bytes = jnp.dtype(case.kv_dtype or case.dtype).itemsize
    one = case.K * case.H * kv_bytes  # k or v of a token
    read = sum(
        new + old - int(_oldest(case, old, old + 1)[0])
        for new, old in zip(case.queries, case.cached, strict=True)
    )
    tokens = num_tokens(case) * case.H * jnp.dtype(case.dtype).itemsize
    decode_only = num_decodes(case) == len(case.queries)
    return Work(
        flops=4 * case.N * case.H * seen(case),
        # keys and values that some query sees; q, k, v in; o out; k and v written
        bytes=2 * one * read + tokens * (2 * case.N + 2 * case.K) + 2 * one * num_tokens(case),
        # a layer's keys; what prefill may hold of the queries is larger than a small cache
        forbidden_bytes=one * layout(case).readable_PS.size if decode_only else None,
    )
