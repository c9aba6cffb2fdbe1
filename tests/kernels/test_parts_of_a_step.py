"""A step whose tokens devices share: each part attends, to the cache of all, as the whole does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.devices import DEVICES
from pallas_kernels.paged_attention import Pages, Ragged, cache_shapes, in_parts, write
from pallas_kernels.paged_attention.mosaic_tpu import unpack
from pallas_kernels.paged_attention.reference import attend

S, M, R, K, H = 4, 8, 6, 2, 8
whole = jax.jit(attend, static_argnames=("window", "scale", "decode_only"))


@settings(max_examples=20)
@given(
    decodes=st.integers(0, 3),
    chunks=st.lists(st.integers(1, 11), max_size=3),
    before=st.lists(st.integers(0, 20), min_size=R, max_size=R),
    parts=st.sampled_from([2, 4, 8]),
    window=st.sampled_from([3, 2**30]),
)
def test_rows_may_be_cut_anywhere(decodes, chunks, before, parts, window):
    """Decode rows, rows that several parts share, parts of padding alone."""
    T, counts = 48, [1] * decodes + chunks
    start_R = np.minimum(np.cumsum([0, *counts, *[0] * (R - len(counts))]), T)
    kv_len_R = np.zeros(R, int)
    kv_len_R[: len(counts)] = np.add(counts, before[: len(counts)])
    ints = lambda x: jnp.asarray(x, jnp.int32)
    ragged = Ragged(
        ints(np.arange(R * M).reshape(R, M)), ints(kv_len_R), ints(start_R), ints(decodes),
        ints(len(counts)),
    )  # fmt: skip
    q_TNH, *kv = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3), [(T, 4, H), *[(1, R * M, K, S, H)] * 2],
            strict=True,
        )
    )  # fmt: skip
    how = {"window": window, "scale": 0.3, "decode_only": False}
    want_TNH = whole(q_TNH, *kv, jnp.int32(0), *ragged, **how)
    cut = in_parts(ragged, T, parts)
    got = [
        whole(q_tNH, *kv, jnp.int32(0), *jax.tree.map(lambda x, p=p: x[p], cut), **how)
        for p, q_tNH in enumerate(q_TNH.reshape(parts, -1, 4, H))
    ]
    tokens = sum(counts)
    np.testing.assert_allclose(jnp.concatenate(got)[:tokens], want_TNH[:tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_the_packed_cache_is_written_as_the_plain_one(head_dim, dtype, keys):
    shape, device = (5, K, head_dim), DEVICES["v6e"]
    k_TKH, v_TKH = (jax.random.normal(next(keys), shape, jnp.bfloat16) for _ in range(2))
    page_T, slot_T = jnp.array([1, 1, 3, 2, 0]), jnp.array([0, 7, 3, 5, 0])
    done = {}
    for impl in ("reference", "mosaic_tpu"):
        shapes = cache_shapes(
            impl, num_layers=2, num_pages=4, num_kv_heads=K, page_size=8, head_dim=head_dim,
            dtype=dtype,
        )  # fmt: skip
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        where = {"device": device, "impl": impl}
        done[impl] = write(k_TKH, v_TKH, empty, jnp.int32(1), page_T, slot_T, **where)
    plain = unpack(done["mosaic_tpu"], num_kv_heads=K, head_dim=head_dim)
    assert isinstance(done["reference"], Pages)
    for got, want in zip(plain, done["reference"], strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
