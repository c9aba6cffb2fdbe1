from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.devices import DEVICES, TPUS
from pallas_kernels.paged_attention import (
    PackedPages,
    Pages,
    PhaseTiles,
    choose,
    mosaic_tpu,
    write_and_attend,
)
from pallas_kernels.paged_attention import mosaic_tpu_words as words
from pallas_kernels.paged_attention.cases import (
    F32,
    FP8,
    KERNEL_CASES,
    Case,
    call,
    comparable,
    inputs,
    num_decodes,
)
from pallas_kernels.paged_attention.mosaic_tpu_program import Tiles
from tests.kernels.harness import TOLERANCE, TPU, once

CPU, V5P, V6E = DEVICES["cpu"], DEVICES["v5p"], DEVICES["v6e"]
# Blocks of two pages, two buffers: the ring turns, and blocks end inside rows, pages and windows.
SMALL = PhaseTiles(Tiles(1, 128, 128, 2), Tiles(16, 128, 128, 2))
# Which cases run on every commit: one for each branch of the kernel.
FAST = ("all_at_once", "three_heads", "many_blocks")
OWN = (
    # one number per word
    Case("float32", (1, 1, 21), (99, 0, 21), N=6, K=3, H=64, S=16, dtype=F32, padding=2),
    # heads that share words, and an odd one
    Case("three_heads", (1, 20), (200, 10), N=3, K=3, H=64, S=16, window=40),
    Case("many_blocks", (1, 1, 70), (300, 127, 250), N=4, K=1, H=128, S=64, dtype=F32),
)


def make(case: Case, key: jax.Array) -> tuple:
    """The case's arguments, compiled at once."""
    return once(lambda key: inputs(case, key, "mosaic_tpu"))(key)


def step(case: Case, args, *, device=V6E, tiles=None):
    def run(q, k, v, pages, layer, page_T, slot_T, ragged, window, sinks, alibi, scales):
        return write_and_attend(
            q, k, v, pages, layer, page_T, slot_T, ragged, window=window,
            attention_chunk_size=case.attention_chunk_size, scale=case.scale or case.H**-0.5,
            softcap=case.softcap, sinks_N=sinks, alibi_N=alibi, kv_scales=scales,
            decode_only=num_decodes(case) == len(case.queries), device=device, impl="mosaic_tpu",
            interpret=TPU, tiles=tiles,
        )  # fmt: skip

    try:
        got = jax.block_until_ready(once(run)(*args))
    except BaseException:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    assert interpreter.races is not None and not interpreter.races.races_found
    return got


def check(case: Case, key, **options) -> None:
    """Equal to the reference on the same numbers, which computes and answers in float32: were it
    to round its answer, a difference could be two roundings."""
    exact = lambda x: x if x.dtype == FP8 else x.astype(jnp.float32)

    @jax.jit
    def reference(q, k, v, packed, *rest):
        pages = mosaic_tpu.unpack(packed, num_kv_heads=case.K, head_dim=case.H)
        exactly: tuple = (*map(exact, (q, k, v)), Pages(*map(exact, pages)), *rest)
        return comparable(case, call(case, "reference", CPU)(*exactly))

    args = make(case, key)
    want = reference(*args)
    got = once(lambda x: comparable(case, x))(step(case, args, **options))
    for g, w, dtype in zip(got, want, (case.dtype, F32, F32), strict=True):
        g, w = (np.asarray(x, np.float32) for x in (g, w))
        assert np.isfinite(g).all(), "something poisoned was read, or an output never written"
        assert np.abs(g - w).max() <= TOLERANCE[jnp.dtype(dtype)] * np.abs(w).max()


def each(cases):
    mark = lambda c: [] if c.name in FAST else [pytest.mark.slow]
    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c.name, marks=mark(c)) for c in cases]
    )


@each(KERNEL_CASES)
def test_the_kernel_equals_the_reference(case, keys):
    check(case, next(keys))


@each(OWN)
def test_small_blocks_on_two_cores_equal_the_reference(case, keys):
    check(case, next(keys), device=V5P, tiles=SMALL)


def test_empty_rows_are_skipped_and_no_entry_past_a_row_is_read(keys):
    """Rows 0 and 2 hold nothing; unused entries name pages that do not exist."""
    case = Case("empty", (1, 1, 1), (20, 40, 9), N=2, K=1, H=128, S=16, dtype=F32, padding=1)
    args = list(make(case, next(keys)))
    whole, _ = step(case, args)
    ragged = args[7]
    entries = np.arange(ragged.pages_RM.shape[1])[None]
    used = -(-np.asarray(ragged.kv_len_R) // case.S)[:, None]
    args[7] = ragged._replace(
        pages_RM=jnp.where(entries < used, ragged.pages_RM, 2**20),
        kv_len_R=ragged.kv_len_R * jnp.asarray([0, 1, 0, 0]),
    )
    some, pages = step(case, args)
    np.testing.assert_array_equal(some[1], whole[1])
    assert np.isfinite(np.asarray(some)).all()
    old, new = (np.asarray(x.kv_LPSCpH) for x in (args[3], pages))
    assert (old != new).any(axis=(-3, -2, -1)).sum() == 1  # one token was written


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, FP8], ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("K,H", [(1, 16), (3, 64), (1, 80), (8, 128), (3, 192)])
def test_a_packed_cache_unpacks(K, H, dtype, keys):
    k, v = (jax.random.normal(next(keys), (2, 3, K, 8, H)).astype(dtype) for _ in range(2))
    packed = mosaic_tpu.pack(Pages(k, v))
    shape = mosaic_tpu.cache_shape(
        num_layers=2, num_pages=3, num_kv_heads=K, page_size=8, head_dim=H, dtype=dtype
    )
    assert packed.kv_LPSCpH.shape == shape and packed.kv_LPSCpH.dtype == dtype
    got = mosaic_tpu.unpack(packed, num_kv_heads=K, head_dim=H)
    for x, y in zip(got, (k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, FP8], ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("K,H", [(1, 64), (3, 64), (1, 80), (8, 128), (3, 192)])
def test_a_steps_words_are_those_of_the_packed_cache(K, H, dtype, keys):
    k, v = (jax.random.normal(next(keys), (5, K, H)).astype(dtype) for _ in range(2))
    how = words.packing(K, H, dtype)
    want = words.as_words(words.pack_kv(k, v, how))
    np.testing.assert_array_equal(words.pack_words(k, v, how), want)


class Size(NamedTuple):
    K: int
    H: int
    dtype: jnp.dtype
    bytes: int  # of a token's k and v


@pytest.mark.parametrize(
    "size",
    [
        Size(8, 128, jnp.dtype(jnp.bfloat16), 2 * 8 * 128 * 2),
        Size(1, 128, jnp.dtype(jnp.bfloat16), 2 * 1 * 128 * 2),
        Size(8, 64, jnp.dtype(jnp.bfloat16), 2 * 8 * 64 * 2),
        Size(8, 128, FP8, 2 * 8 * 128),
    ],
)
def test_a_token_of_the_usual_shapes_has_no_padding(size):
    shape = mosaic_tpu.cache_shape(
        num_layers=1, num_pages=1, num_kv_heads=size.K, page_size=1, head_dim=size.H,
        dtype=size.dtype,
    )  # fmt: skip
    assert np.prod(shape) * size.dtype.itemsize == size.bytes


@pytest.mark.parametrize(
    "changed,named",
    [({"page_size": 48}, "page_size"), ({"page_size": 4}, "page_size"),
     ({"head_dim": 512}, "head_dim"), ({"dtype": jnp.float16}, "dtype")],
)  # fmt: skip
def test_caches_are_refused_by_name_and_left_to_the_reference(changed, named):
    cache = {"page_size": 64, "head_dim": 128, "dtype": jnp.bfloat16}
    assert all(choose(device, **cache) == "mosaic_tpu" for device in TPUS)
    refusal = mosaic_tpu.refuse(**{**cache, **changed}, distance_bias=False, apart=False)
    assert refusal is not None and named in refusal
    assert choose(V6E, **{**cache, **changed}) == "reference"


def arguments(case: Case, **fields):
    q, k, v, pages, layer, page_T, slot_T, ragged, window, *_ = jax.eval_shape(
        lambda key: inputs(case, key, "mosaic_tpu"), jax.random.key(0)
    )
    made = {
        "q_TNH": q, "k_TKH": k, "v_TKH": v, "pages": pages, "layer": layer, "page_T": page_T,
        "slot_T": slot_T, "ragged": ragged, "window": window,
    }  # fmt: skip
    return {**made, **fields}


def attend(**arrays):
    run = lambda arrays: write_and_attend(
        **arrays, scale=1.0, decode_only=True, device=V6E, impl="mosaic_tpu"
    )
    return jax.eval_shape(run, arrays)


SHAPE = Case("shape", (1,) * 64, (63,) * 64, N=2, K=1, H=128, S=64)
of = jax.ShapeDtypeStruct


def test_a_page_table_larger_than_scalar_memory_is_an_error():
    made = arguments(SHAPE)
    table = of((64, 4096), jnp.int32)
    with pytest.raises(ValueError, match="pages_RM has 64 x 4096 entries"):
        attend(**{**made, "ragged": made["ragged"]._replace(pages_RM=table)})


def test_pages_of_another_layout_are_an_error():
    wrong = PackedPages(of((2, 65, 64, 2, 2, 128), jnp.bfloat16))
    with pytest.raises(ValueError, match="kv_LPSCpH has shape"):
        attend(**arguments(SHAPE, pages=wrong))


def test_queries_of_half_precision_are_an_error():
    made = arguments(SHAPE)
    half = {n: of(made[n].shape, jnp.float16) for n in ("q_TNH", "k_TKH", "v_TKH")}
    pages = PackedPages(of((*made["pages"].kv_LPSCpH.shape[:3], 1, 4, 128), FP8))
    with pytest.raises(ValueError, match="q_TNH is float16"):
        attend(**{**made, **half, "pages": pages})
