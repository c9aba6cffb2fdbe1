import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases import widened
from pallas_kernels.devices import DEVICES
from pallas_kernels.int4_matmul import int4_matmul, tiles
from pallas_kernels.int4_matmul.cases import (
    CASES,
    F32,
    MODEL_CASES,
    Case,
    call,
    candidates,
    impls,
    inputs,
    problem_of,
)
from tests.kernels.harness import assert_close, check_case

CPU, H200, V6E = DEVICES["cpu"], DEVICES["h200"], DEVICES["v6e"]
BY_NAME = {c.name: c for c in CASES}
runs = lambda device, impl: [c for c in CASES if impl in impls(c, device)]
PLAIN, ZEROS = BY_NAME["one_token"], BY_NAME["group_32_zeros"]


@pytest.mark.parametrize("case", runs(H200, "mosaic_gpu"), ids=lambda c: c.name)
def test_mosaic_gpu_equals_the_reference(case, keys):
    check_case("int4_matmul", case, "mosaic_gpu", next(keys))


@pytest.mark.parametrize("case", runs(V6E, "mosaic_tpu"), ids=lambda c: c.name)
def test_mosaic_tpu_equals_the_reference(case, keys):
    check_case("int4_matmul", case, "mosaic_tpu", next(keys))


@pytest.mark.parametrize("case", runs(H200, "xla"), ids=lambda c: c.name)
def test_xla_equals_the_reference(case, keys):
    assert impls(case, V6E) == impls(case, H200) == ("xla",)
    args = inputs(case, next(keys), "xla")
    run = lambda impl, device, args: jax.jit(call(case, impl, device))(*args)
    assert_close(run("xla", H200, args), run("reference", CPU, widened(args)))


@pytest.mark.parametrize("case", [PLAIN, ZEROS], ids=lambda c: c.name)
def test_the_reference_is_the_formula(case, keys):
    """In numpy, one group after the other, in float64."""
    args = inputs(case, next(keys), "reference")
    x, w, scale, *zero = (np.asarray(a.astype(jnp.float32), np.float64) for a in args)
    want = 0
    for g, s in enumerate(scale):
        columns = slice(g * case.group, (g + 1) * case.group)
        shifted = w[:, columns] - (zero[0][g][:, None] if zero else 0)
        want = want + x[:, columns] @ (shifted * s[:, None]).T
    got = call(case, "reference", CPU)(*args)
    # One rounding to bfloat16: 2^-9 of the value.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("device", [H200, DEVICES["h100"]], ids=lambda d: d.name)
@pytest.mark.parametrize(
    "case", [c for c in MODEL_CASES if "mosaic_gpu" in impls(c, H200)], ids=lambda c: c.name
)
def test_chosen_tiles_are_allowed_and_cheapest(case, device):
    found = candidates(case, device)
    problem = problem_of(case)
    for t in found:
        tiles.check(t, problem, device)
    assert tiles.choose(problem, device) == found[0]


SHAPE = jax.ShapeDtypeStruct


def arguments(**changes):
    """Shapes of a call that is right, but for `changes`."""
    right = {
        "x_MK": SHAPE((8, 256), jnp.bfloat16),
        "w_NK": SHAPE((128, 256), jnp.int4),
        "scale_GN": SHAPE((2, 128), jnp.bfloat16),
    }
    return right | changes


WRONG = {
    "x_MK is int8": {"x_MK": SHAPE((8, 256), jnp.int8)},
    "w_NK is uint4; it must be int4": {"w_NK": SHAPE((128, 256), jnp.uint4)},
    "w_NK is int4; it must be uint4": {"zero_GN": SHAPE((2, 128), jnp.bfloat16)},
    "x_MK has shape": {"x_MK": SHAPE((8, 128), jnp.bfloat16)},
    "none|no axis may be 0": {"x_MK": SHAPE((0, 256), jnp.bfloat16)},
    "scale_GN is float16": {"scale_GN": SHAPE((2, 128), jnp.float16)},
    "scale_GN has shape": {"scale_GN": SHAPE((2, 64), jnp.bfloat16)},
    "scale_GN has 3 rows": {"scale_GN": SHAPE((3, 128), jnp.bfloat16)},
    "scale_GN has 32 rows": {"scale_GN": SHAPE((32, 128), jnp.bfloat16)},
    "zero_GN has shape": {
        "w_NK": SHAPE((128, 256), jnp.uint4), "zero_GN": SHAPE((1, 128), jnp.bfloat16),
    },
    "zero_GN is float32": {
        "w_NK": SHAPE((128, 256), jnp.uint4), "zero_GN": SHAPE((2, 128), jnp.float32),
    },
}  # fmt: skip


@pytest.fixture
def unchecked():
    """The function without jaxtyping's own checks, as users have it."""
    return inspect.unwrap(int4_matmul)


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message, unchecked):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda a: unchecked(**a, device=CPU), arguments(**WRONG[message]))


@pytest.mark.parametrize(
    ("case", "device", "impl", "message"),
    [
        (Case("", 8, 96, 256, 128), H200, "mosaic_gpu", "N is 96"),
        (Case("", 8, 64, 96, 32), H200, "mosaic_gpu", "K is 96"),
        (Case("", 8, 192, 256, 128), V6E, "mosaic_tpu", "N is 192"),
        (Case("", 8, 128, 192, 64), V6E, "mosaic_tpu", "K is 192"),
        (PLAIN, H200, "xla", "impl is 'xla'"),
        (BY_NAME["nf4"], H200, "mosaic_gpu", "impl is 'mosaic_gpu'"),
        (PLAIN._replace(grid="e2m1", zeros=True), H200, "mosaic_gpu", "grid is 'e2m1', but zero"),
        (PLAIN._replace(dtype=F32), H200, "mosaic_gpu", "x_MK is float32"),
        (PLAIN._replace(layers=0), H200, "mosaic_gpu", "no axis may be 0"),
    ],
)
def test_a_named_implementation_refuses_what_it_does_not_take(case, device, impl, message, keys):
    args = jax.eval_shape(lambda key: inputs(case, key, impl), next(keys))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call(case, impl, device), *args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 12}, "tiles.tokens is 12"),
        ({"tokens": 264}, "tiles.tokens is 264"),
        ({"width": 32}, "tiles.width is 32"),
        ({"wgs_n": 3}, "N is 128"),
        ({"chunks": 4}, "K is 256"),
        ({"wgs_n": 1, "wgs_k": 5, "width": 64}, "K is 256"),
        ({"splits": 3}, "tiles.splits is 3"),
        ({"tokens": 256, "stages": 9}, "bytes of SMEM"),
    ],
)
def test_wrong_tiles_are_named(change, message, keys):
    assert PLAIN.gpu_tiles is not None
    case = PLAIN._replace(gpu_tiles=PLAIN.gpu_tiles._replace(**change))
    args = jax.eval_shape(lambda key: inputs(case, key, "mosaic_gpu"), next(keys))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call(case, "mosaic_gpu", H200), *args)
