import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases import widened
from pallas_kernels.devices import DEVICES, GPUS, TPUS
from pallas_kernels.mla_attention import (
    Pages,
    Ragged,
    cache_shapes,
    choose,
    reference,
    write_and_attend,
)
from pallas_kernels.mla_attention import mosaic_gpu_schedule as schedule
from pallas_kernels.mla_attention.cases import (
    CASES,
    CPU_CASES,
    F32,
    KERNEL_CASES,
    MODEL_CASES,
    call,
    comparable,
    inputs,
    num_decodes,
    work,
)
from tests.kernels import harness

CPU = DEVICES["cpu"]
SCALE = 192**-0.5
# Each feature once; the others are slow.
FAST_CPU = ("many", "both", "eight_bits")
FAST = {
    "mosaic_gpu": ("cut_often",),
    "mosaic_tpu": ("decode", "fp8_pages"),
}


def case_named(name):
    return next(c for c in CASES if c.name == name)


def run(case, key, **changes):
    """The reference, with some of its inputs replaced, by their place."""
    arguments = list(inputs(case, key, "reference"))
    for place, x in changes.items():
        arguments[int(place[1:])] = x
    return harness.once(call(case, "reference", CPU))(*arguments)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c.name in FAST_CPU else [pytest.mark.slow]) for c in CPU_CASES],
    ids=lambda c: c.name,
)
def test_blocks_equal_the_definition(case, keys):
    arguments = inputs(case, next(keys), "reference")
    o_TNC, pages = harness.once(call(case, "reference", CPU))(*arguments)
    q_TNC, q_TNH, *_, layer, _, _, ragged, kv_scale = arguments
    definition = harness.once(functools.partial(reference.definition, scale=SCALE))
    want = definition(q_TNC, q_TNH, pages.kv_LPSD, layer, *ragged, kv_scale=kv_scale)
    harness.assert_close(comparable(case, (o_TNC, pages))[0], comparable(case, (want, pages))[0])


def on(impl):
    device = harness.DEVICE_OF[impl]
    return [
        pytest.param(
            impl, case, id=f"{impl}-{case.name}",
            marks=() if case.name in FAST[impl] else pytest.mark.slow,
        )
        for case in KERNEL_CASES
        if choose_for(case, device) == impl
    ]  # fmt: skip


def choose_for(case, device):
    dtype = case.kv_dtype or case.dtype
    return choose(device, page_size=case.S, latent_dim=case.C, rope_dim=case.H, dtype=dtype)


@pytest.mark.parametrize(("impl", "case"), [*on("mosaic_gpu"), *on("mosaic_tpu")])
def test_the_kernel_equals_the_reference_without_a_race(impl, case, keys):
    key = next(keys)
    reference_step = harness.once(call(case, "reference", CPU))
    want = comparable(case, reference_step(*widened(inputs(case, key, "reference"))))
    gpu = impl == "mosaic_gpu"
    interpret = harness.GPU if gpu else harness.TPU
    step = call(case, impl, harness.DEVICE_OF[impl], interpret=interpret)
    try:
        got = jax.block_until_ready(step(*inputs(case, key, impl)))
    except BaseException:
        harness.plgpu_reset() if gpu else harness.pltpu.reset_tpu_interpret_mode_state()
        raise
    harness.assert_close(comparable(case, got), want)
    found = harness.gpu_interpreter.get_races() if gpu else harness.tpu_interpreter.races
    assert found is not None and not found.races_found
    assert np.isfinite(np.asarray(got[0], np.float32)).all(), "also of padding tokens"


def test_a_row_does_not_see_its_neighbours(keys):
    """Bit for bit: other rows' lengths and queries change nothing."""
    case = case_named("many")
    key = next(keys)
    q, *_, ragged, _ = inputs(case, key, "reference")
    want, _ = run(case, key)
    others = np.r_[0:3, 4 : len(case.queries)]
    lengths = np.asarray(ragged.kv_len_R).copy()
    lengths[others] = np.maximum(lengths[others] // 3, 1)
    shorter = ragged._replace(kv_len_R=jnp.asarray(lengths))
    got, _ = run(case, key, _0=q.at[others].set(-q[others]), _8=shorter)
    np.testing.assert_array_equal(got[3], want[3])
    assert not np.array_equal(got[4], want[4])


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["mosaic_gpu", "mosaic_tpu"])
def test_a_row_of_a_kernel_does_not_see_its_neighbours(impl, keys):
    """Bit for bit, although the row is cut and other blocks do its parts."""
    case = case_named("cut_often")
    interpret = harness.GPU if impl == "mosaic_gpu" else harness.TPU
    step = call(case, impl, harness.DEVICE_OF[impl], interpret=interpret)
    arguments = list(inputs(case, next(keys), impl))
    want, _ = jax.block_until_ready(step(*arguments))
    ragged = arguments[8]
    arguments[8] = ragged._replace(kv_len_R=ragged.kv_len_R.at[1].set(1))
    got, _ = jax.block_until_ready(step(*arguments))
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), np.asarray(want[0], np.float32))
    assert not np.array_equal(np.asarray(got[1], np.float32), np.asarray(want[1], np.float32))


def test_the_cache_is_updated_in_place(keys):
    """Compiled for a cache far larger than the step: nothing of its size is copied."""
    case = case_named("both")
    arguments = list(inputs(case, next(keys), "reference"))
    cache = arguments[4].kv_LPSD
    big = jax.ShapeDtypeStruct((16, 4096, *cache.shape[2:]), cache.dtype)

    def step(kv_LPSD):
        arguments[4] = Pages(kv_LPSD)
        return call(case, "reference", CPU)(*arguments)

    memory = jax.jit(step, donate_argnums=0).lower(big).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == big.size * 4
    assert memory.temp_size_in_bytes < 0.01 * big.size * 4


# The GPU's division of work.


def divided(kv_len, queries, *, num_decodes, per_tile, pages, parts, decode_only=False):
    start = np.cumsum([0, *queries])
    ragged = Ragged(
        jnp.zeros((len(kv_len), 99), jnp.int32), jnp.asarray(kv_len, jnp.int32),
        jnp.asarray(start, jnp.int32), jnp.int32(num_decodes), jnp.int32(len(kv_len)),
    )  # fmt: skip
    tokens = int(start[-1]) + (0 if decode_only else 3)  # of padding
    items = schedule.items(
        ragged, tokens=tokens, queries=per_tile, page_size=64, decode_only=decode_only
    )
    units, merges, first = schedule.units(items, pages=pages, most=99, parts=parts)
    return tokens, *jax.tree.map(np.asarray, (items, units, merges, first))


@pytest.mark.parametrize("per_tile", [1, 4])
def test_units_visit_each_page_of_each_query_once(per_tile):
    kv_len, queries = (70, 0, 1000, 300, 9), (1, 1, 30, 1, 9)
    tokens, items, units, merges, first = divided(
        kv_len, queries, num_decodes=2, per_tile=per_tile, pages=4, parts=7
    )
    assert first[0] == 0 and (np.diff(first) >= 0).all()
    visited = np.zeros((tokens, 99), int)
    for u in range(first[-1]):
        t, n = units.token_U[u], units.queries_U[u]
        visited[t : t + n, units.begin_U[u] : units.end_U[u]] += 1
    start = np.cumsum([0, *queries])
    row = np.repeat(np.arange(len(queries)), queries)
    for t in range(tokens):
        length = 0 if t >= start[-1] else kv_len[row[t]]
        seen = length - (start[row[t] + 1] - 1 - t) if length else 0
        # At least what it sees: a tile visits what its last query does.
        assert (visited[t] <= 1).all() and visited[t, : -(-seen // 64)].all()
        assert seen > 0 or not visited[t].any()
    covered = np.concatenate([np.arange(t, t + n) for t, n in zip(*items[1:3], strict=True)])
    np.testing.assert_array_equal(np.sort(covered), np.arange(tokens))
    assert merges.units_I.sum() == first[-1]


def test_where_a_row_is_cut_does_not_depend_on_its_neighbours():
    of_row_1 = []
    for others in (5, 3000):
        _, _, units, _, first = divided(
            (others, 1500, others), (1, 1, 1), num_decodes=3, per_tile=1, pages=6, parts=5,
            decode_only=True,
        )  # fmt: skip
        mine = np.flatnonzero(units.token_U[: first[-1]] == 1)
        of_row_1.append([(units.begin_U[u], units.end_U[u]) for u in mine])
    assert of_row_1[0] == of_row_1[1] == [(0, 6), (6, 12), (12, 18), (18, 24)]


def test_parts_differ_by_about_a_unit():
    lengths = tuple(range(64, 64 * 65, 64))
    _, _, units, _, first = divided(
        lengths, (1,) * 64, num_decodes=64, per_tile=1, pages=8, parts=33, decode_only=True
    )
    cost = units.end_U - units.begin_U + schedule.UNIT_COST
    shares = [cost[a:b].sum() for a, b in itertools.pairwise(first)]
    assert max(shares) <= np.mean(shares) + 8 + schedule.UNIT_COST


def test_units_are_even_and_fill_the_device():
    for items, pages, parts in ((1, 513, 132), (64, 65, 132), (256, 65, 66), (2113, 129, 66)):
        unit = schedule.unit_pages(items, pages, parts)
        assert unit % 2 == 0 and 4 <= unit <= pages + 1
        assert items * -(-pages // unit) >= min(parts, items * pages // 4)


# What is refused.


@pytest.mark.parametrize("device", [*GPUS, *TPUS], ids=lambda d: d.name)
def test_models_run_a_kernel_with_the_devices_own_layout(device):
    impl = "mosaic_gpu" if device.platform == "cuda" else "mosaic_tpu"
    for case in MODEL_CASES:
        if case.kv_dtype is None:
            assert choose_for(case, device) == impl
            assert work(case).bytes > 0 and num_decodes(case) <= len(case.queries)
    shape = cache_shapes(
        impl, num_layers=3, num_pages=5, page_size=64, latent_dim=512, rope_dim=64,
        dtype=jnp.bfloat16,
    ).kv_LPSD.shape  # fmt: skip
    assert shape == (3, 5, 64, 576 if impl == "mosaic_gpu" else 640)


@pytest.mark.parametrize(
    ("impl", "change", "says"),
    [
        ("mosaic_gpu", {"page_size": 32}, "page_size is 32"),
        ("mosaic_gpu", {"latent_dim": 640}, "latent_dim is 640"),
        ("mosaic_gpu", {"rope_dim": 32}, "rope_dim is 32"),
        ("mosaic_gpu", {"dtype": jnp.float32}, "dtype is float32"),
        ("mosaic_tpu", {"page_size": 8}, "page_size is 8"),
        ("mosaic_tpu", {"latent_dim": 500}, "latent_dim is 500"),
        ("mosaic_tpu", {"rope_dim": 192}, "rope_dim is 192"),
        ("mosaic_tpu", {"dtype": jnp.float32}, "dtype is float32"),
        ("xla", {}, "impl is 'xla'"),
    ],
)
def test_a_cache_that_an_implementation_does_not_take(impl, change, says):
    cache = {"page_size": 64, "latent_dim": 512, "rope_dim": 64, "dtype": jnp.bfloat16} | change
    with pytest.raises(ValueError, match=says):
        cache_shapes(impl, num_layers=1, num_pages=1, **cache)


@pytest.mark.parametrize(
    ("place", "shape", "dtype", "says"),
    [
        (0, (20, 4), F32, "q_TNC has shape"),
        (0, (22, 4, 16), jnp.bfloat16, "q_TNH is float32"),
        (1, (22, 5, 8), F32, "q_TNH has shape"),
        (2, (21, 16), F32, "latent_TC has shape"),
        (3, (22, 9), F32, "rope_TH has shape"),
        (4, (2, 3, 8, 25), F32, "pages.kv_LPSD has shape"),
        (4, (2, 3, 8, 24), jnp.bfloat16, "pages.kv_LPSD is bfloat16"),
        (4, (3, 8, 24), F32, "pages.kv_LPSD has shape"),
        (6, (21,), jnp.int32, "page_T has shape"),
        (7, (21,), jnp.int32, "slot_T has shape"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(place, shape, dtype, says, keys):
    case = case_named("eight_bits")._replace(kv_dtype=None, queries=(1, 20), padding=1)
    x = jax.ShapeDtypeStruct(shape, dtype)
    arguments = list(jax.eval_shape(lambda key: inputs(case, key, "reference"), jax.random.key(0)))
    arguments[place] = Pages(x) if place == 4 else x
    *arguments, kv_scale = arguments
    unchecked = inspect.unwrap(write_and_attend)  # without jaxtyping's own checks
    step = functools.partial(unchecked, scale=SCALE, decode_only=False, device=CPU)
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(step, *arguments, kv_scale=kv_scale)


def test_scale_of_a_cache_that_has_none(keys):
    with pytest.raises(ValueError, match="kv_scale is given, but pages are float32"):
        run(case_named("one"), next(keys), _9=jnp.float32(2.0))


def test_decode_only_of_rows_with_more_queries(keys):
    case = case_named("many")
    ragged = inputs(case, next(keys), "reference")[8]
    fewer = ragged._replace(
        pages_RM=ragged.pages_RM[:4], kv_len_R=ragged.kv_len_R[:4], start_R=ragged.start_R[:5]
    )
    with pytest.raises(ValueError, match="decode_only is True for 24 tokens in 4 rows"):
        run(case, next(keys), _8=fewer)


def test_names_of_cases_are_unique():
    names = [c.name for c in (*CPU_CASES, *KERNEL_CASES, *MODEL_CASES)]
    assert len(set(names)) == len(names)


def test_a_page_that_there_is_not_is_named(keys):
    """Where contents are at hand, outside of jit."""
    case = case_named("one")
    given = list(inputs(case, next(keys), "reference"))
    given[6] = given[6].at[0].set(10**6)
    with pytest.raises(ValueError, match="page_T has 1000000; it must be in 0 to"):
        call(case, "reference", CPU)(*given)
