"""The shapes that tests, benchmarks and tuning all run. Add one here, get all three."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    name: str
    queries: tuple[int, ...]  # of each row; the leading ones are decode rows
    cached: tuple[int, ...]  # tokens of each row before this step
    N: int  # query heads
    K: int  # kv heads
    H: int  # head_dim
    S: int  # tokens per page
    window: int | None = None
    padding: int = 0  # tokens and rows beside those


CASES = (
    Case("decode_one", (1,), (0,), N=4, K=2, H=16, S=4),
    Case("decode_gqa", (1, 1, 1), (5, 200, 63), N=8, K=2, H=32, S=16, padding=1),
    Case("decode_many", (1,) * 19, tuple(range(0, 19 * 23, 23)), N=4, K=4, H=8, S=8, padding=5),
    Case("decode_mqa", (1, 1), (33, 140), N=8, K=1, H=64, S=64),
    Case("prefill_one", (100,), (0,), N=4, K=2, H=16, S=16),
    Case("prefill_chunk", (33,), (150,), N=4, K=2, H=16, S=16, padding=7),
    Case("prefill_many", (70, 3, 12), (0, 130, 9), N=4, K=4, H=8, S=4, padding=3),
    Case("mixed", (1, 1, 40, 17), (99, 300, 0, 21), N=8, K=4, H=32, S=16, padding=5),
    Case("window", (1, 1, 40), (99, 300, 150), N=4, K=2, H=16, S=8, window=24, padding=2),
    Case("page_of_one", (1, 9), (11, 3), N=4, K=2, H=8, S=1),
)  # fmt: skip


def num_decodes(case: Case) -> int:
    """The leading rows with one query."""
    return next((i for i, n in enumerate(case.queries) if n != 1), len(case.queries))


def make_inputs(case: Case, key: jax.Array, dtype=jnp.float32, layers: int = 2):
    """(q, k, v, k cache, v cache, page_T, slot_T, ragged fields): pages shuffled, page 0 the
    padding's; every slot that nobody may read holds 1e4."""
    rng = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
    rows, pad = len(case.queries), case.padding
    lengths = [q + c for q, c in zip(case.queries, case.cached, strict=True)]
    per_row = [-(-n // case.S) for n in lengths]
    M, total = max(per_row) + 1, sum(per_row)
    order = rng.permutation(total) + 1
    pages = rng.integers(0, total + 1, (rows + pad, M)).astype(np.int32)
    taken = np.cumsum([0, *per_row])
    tokens = sum(case.queries)
    cache = np.full((2, layers, total + 1, case.K, case.S, case.H), 1e4, np.float32)
    page_T, slot_T = np.zeros((2, tokens + pad), np.int32)
    t = 0
    for r, (n, old) in enumerate(zip(lengths, case.cached, strict=True)):
        pages[r, : per_row[r]] = order[taken[r] : taken[r + 1]]
        pos = np.arange(n)
        page, slot = pages[r, pos // case.S], pos % case.S
        cache[:, :, page[:old], :, slot[:old]] = rng.normal(size=(old, 2, layers, case.K, case.H))
        page_T[t : t + n - old], slot_T[t : t + n - old] = page[old:], slot[old:]
        t += n - old
    q_TNH = rng.normal(size=(tokens + pad, case.N, case.H))
    k_TKH, v_TKH = rng.normal(size=(2, tokens + pad, case.K, case.H))
    start = np.cumsum([0, *case.queries] + [0] * pad)
    ragged = (
        jnp.asarray(pages),
        jnp.asarray(lengths + [0] * pad, jnp.int32),
        jnp.asarray(start, jnp.int32),
        jnp.int32(num_decodes(case)),
        jnp.int32(rows),
    )
    arrays = (jnp.asarray(x, dtype) for x in (q_TNH, k_TKH, v_TKH, *cache))
    return (*arrays, jnp.asarray(page_T), jnp.asarray(slot_T), ragged)
