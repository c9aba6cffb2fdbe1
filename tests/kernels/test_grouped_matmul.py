from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import DEVICES
from pallas_kernels.grouped_matmul import check, choose, grouped_matmul, reference
from pallas_kernels.grouped_matmul.cases import CASES, F32, MODEL_CASES, call, impls, inputs, work
from pallas_kernels.grouped_matmul.metadata import most_tiles, row_tiles, tile_visits
from tests.kernels.harness import assert_close, check_case, once

CPU, GPU, TPU = (DEVICES[name] for name in ("cpu", "h200", "v6e"))
ids = lambda case: case.name
# Every kind of weights and every shape of tile once; the others are slow.
QUICK = (
    *("ragged", "quarters", "no_rows", "float32", "int8", "int4_128", "fp8_channel", "fp8_block"),
    *("int4_of_a_stack", "uint4_32"),
)


def on(device):
    best = choose(device)
    return [
        pytest.param(case, marks=[] if case.name in QUICK else [pytest.mark.slow])
        for case in CASES
        if best in impls(case, device)
    ]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_reference_equals_the_definition(case, keys):
    args = once(lambda key: inputs(case, key, "reference"))(next(keys))
    got = jax.jit(call(case, "reference", CPU))(*args)
    if case.layers:  # the last of the stack's
        x, w, sizes, *scales = args
        args = (x, w[-1], sizes, *(None if a is None else a[-1] for a in scales))
    assert_close(got, jax.jit(partial(reference.definition, grid=case.grid))(*args))


@pytest.mark.parametrize("case", on(GPU), ids=ids)
def test_mosaic_gpu_equals_the_reference(case, keys):
    check_case("grouped_matmul", case, "mosaic_gpu", next(keys))


@pytest.mark.parametrize("case", on(TPU), ids=ids)
def test_mosaic_tpu_equals_the_reference(case, keys):
    check_case("grouped_matmul", case, "mosaic_tpu", next(keys))


def test_padding_rows_are_zeros(keys):
    case = next(c for c in CASES if c.name == "float32")
    y_MN = call(case, "reference", CPU)(*inputs(case, next(keys), "reference"))
    assert not np.asarray(y_MN)[sum(case.sizes) :].any()
    assert np.asarray(y_MN)[: sum(case.sizes)].any(axis=1).all()


SIZES = ((5, 0, 13, 1, 0, 9), (0, 0), (64,), (0, 31, 1), (8, 8, 8))


@pytest.mark.parametrize("align", (1, 8))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_row_tiles_hold_every_row_once_and_none_of_another_group(sizes, align):
    M, rows = sum(sizes) + 3, 16
    tile = jax.tree.map(np.asarray, row_tiles(jnp.asarray(sizes, jnp.int32), M, rows, align))
    assert tile.tiles <= most_tiles(M, len(sizes), rows, align) == len(tile.row_T)
    got = np.full(M, -1)
    for t in range(tile.tiles):
        first = tile.row_T[t] + tile.first_T[t]
        assert tile.row_T[t] % align == 0
        assert 0 <= tile.first_T[t] < max(align, 1)
        assert tile.first_T[t] + tile.count_T[t] <= rows
        assert (got[first : first + tile.count_T[t]] == -1).all()
        got[first : first + tile.count_T[t]] = tile.expert_T[t]
    np.testing.assert_array_equal(got, np.repeat(np.arange(len(sizes) + 1), (*sizes, 3)))
    assert (tile.expert_T[: tile.expert_tiles] < len(sizes)).all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tile_visits_hold_every_row_once_and_open_every_tile_first(sizes):
    M, rows = sum(sizes) + 21, 16
    visit = jax.tree.map(np.asarray, tile_visits(jnp.asarray(sizes, jnp.int32), M, rows))
    assert visit.visits <= len(visit.tile_V)
    got, seen = np.full(M, -1), -1
    for v in range(visit.visits):
        tile, expert = visit.tile_V[v], visit.expert_V[v]
        assert (visit.first_V[v] == 0) == (tile == seen + 1)
        assert tile in (seen, seen + 1)
        seen = tile
        got[tile * rows + visit.first_V[v] : tile * rows + visit.end_V[v]] = expert
        assert visit.weights_V[v] <= expert
    want = np.repeat(np.arange(len(sizes) + 1), (*sizes, 21))
    # Rows of padding in a tile that an expert opened are zeros without a visit.
    want[(got == -1) & (want == len(sizes))] = -1
    np.testing.assert_array_equal(got, want)
    assert seen == -(-M // rows) - 1


def test_work_counts_only_experts_with_rows():
    case = next(c for c in CASES if c.name == "one_group")
    weights = case.K * case.N * 2
    assert work(case).bytes == weights + 40 * (case.K + case.N) * 2
    assert work(case).forbidden_bytes == 2 * weights


def test_model_cases_have_unique_names():
    names = [case.name for case in (*CASES, *MODEL_CASES)]
    assert len(names) == len(set(names))


BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn
S = jax.ShapeDtypeStruct
ARGS = {
    "x_MK": S((8, 256), BF16),
    "w_ENK": S((2, 128, 256), BF16),
    "group_sizes_E": S((2,), jnp.int32),
    "scale": None,
    "zero": None,
}
INT8 = {"w_ENK": S((2, 128, 256), jnp.int8), "scale": S((2, 128), BF16)}
INT4 = {"w_ENK": S((2, 128, 256), jnp.int4), "scale": S((2, 2, 128), BF16)}
UINT4 = INT4 | {"w_ENK": S((2, 128, 256), jnp.uint4)}
E4M3 = {"w_ENK": S((2, 128, 256), FP8), "scale": S((2, 1, 2), jnp.float32)}
BAD = (
    ("x_MK", {"x_MK": S((8, 128), BF16)}),
    ("x_MK", {"x_MK": S((0, 256), BF16)}),
    ("x_MK", {"x_MK": S((8, 256), jnp.float64)}),
    ("w_ENK", {"w_ENK": S((128, 256), BF16)}),
    ("w_ENK", {"w_ENK": S((2, 128, 256), jnp.float16)}),
    ("group_sizes_E", {"group_sizes_E": S((3,), jnp.int32)}),
    ("group_sizes_E", {"group_sizes_E": S((2,), jnp.int16)}),
    ("scale", {"scale": S((2, 128), BF16)}),
    ("scale", INT8 | {"scale": None}),
    ("scale", INT8 | {"scale": S((2, 64), BF16)}),
    ("scale", INT8 | {"scale": S((2, 128), jnp.float16)}),
    ("scale", INT4 | {"scale": S((2, 32, 128), BF16)}),
    ("scale", INT4 | {"scale": S((2, 128), BF16)}),
    ("scale", E4M3 | {"scale": S((2, 1, 2), BF16)}),
    ("scale", E4M3 | {"scale": S((2, 2, 2), jnp.float32)}),
    ("scale", E4M3 | {"scale": S((), jnp.float32)}),
    ("zero", {"zero": S((2, 2, 128), BF16)}),
    ("zero", UINT4),
    ("zero", UINT4 | {"zero": S((2, 1, 128), BF16)}),
    ("zero", UINT4 | {"zero": S((2, 2, 128), jnp.float32)}),
    ("w_ENK", INT8 | {"grid": "e2m1"}),
    ("w_ENK", INT4 | {"grid": (1.0,) * 16}),
    ("grid", UINT4 | {"grid": (1.0,) * 8}),
    ("grid", UINT4 | {"zero": S((2, 2, 128), BF16), "grid": "e2m1"}),
)


def trace(args, **options):
    scaled = {name: args[name] for name in ("scale", "zero") if args[name] is not None}
    plain = {name: a for name, a in args.items() if name not in ("scale", "zero")}
    run = lambda plain, scaled: grouped_matmul(
        plain["x_MK"], plain["w_ENK"], plain["group_sizes_E"], **scaled, **options
    )
    return jax.eval_shape(run, plain, scaled)


@pytest.mark.parametrize(("name", "changes"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_named(name, changes):
    with pytest.raises(ValueError, match=rf"^{name} "):
        check(**(ARGS | changes))


def test_an_unknown_impl_is_named():
    with pytest.raises(ValueError, match="impl is 'xla'"):
        trace(ARGS, device=CPU, impl="xla")


@pytest.mark.parametrize(
    ("device", "name", "changes"),
    (
        (GPU, "x_MK", {"x_MK": S((8, 256), F32), "w_ENK": S((2, 128, 256), F32)}),
        (GPU, "x_MK", INT8 | {"x_MK": S((8, 256), F32), "scale": S((2, 128), F32)}),
        (TPU, "x_MK", INT8 | {"x_MK": S((8, 256), F32), "scale": S((2, 128), F32)}),
        (GPU, "K of w_ENK", {"x_MK": S((8, 224), BF16), "w_ENK": S((2, 128, 224), BF16)}),
        (GPU, "N of w_ENK", {"w_ENK": S((2, 124, 256), BF16)}),
        (GPU, "w_ENK", {"w_ENK": S((2, 32, 256), BF16)}),
        (TPU, "x_MK", {"x_MK": S((8, 256), jnp.float16), "w_ENK": S((2, 128, 256), jnp.float16)}),
        (TPU, "K of w_ENK", {"x_MK": S((8, 200), BF16), "w_ENK": S((2, 128, 200), BF16)}),
    ),
)
def test_what_a_kernel_does_not_take_is_named(device, name, changes):
    with pytest.raises(ValueError, match=rf"^{name} "):
        trace(ARGS | changes, device=device)
