import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import DEVICES
from pallas_kernels.int8_matmul import choose, int8_grouped_matmul, int8_matmul, reference
from pallas_kernels.int8_matmul.cases import CASES, impls
from tests.kernels.harness import check_case

CPU, H200, V6E = DEVICES["cpu"], DEVICES["h200"], DEVICES["v6e"]
SHAPE = jax.ShapeDtypeStruct


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_mosaic_gpu_equals_the_reference(case, keys):
    check_case("int8_matmul", case, "mosaic_gpu", next(keys))


@pytest.mark.parametrize(
    "case", [c for c in CASES if "mosaic_tpu" in impls(c, V6E)], ids=lambda c: c.name
)
def test_mosaic_tpu_equals_the_reference(case, keys):
    check_case("int8_matmul", case, "mosaic_tpu", next(keys))


def arrays(keys, M=5, N=64, K=96):
    x_MK = jax.random.normal(next(keys), (M, K), jnp.bfloat16)
    w_NK = jax.random.randint(next(keys), (N, K), -128, 128, jnp.int8)
    return x_MK, w_NK, jax.random.uniform(next(keys), (N,), jnp.float32, 0.5, 1.5)


def test_float_activations_are_the_formula(keys):
    x, w, scale = arrays(keys)
    got = int8_matmul(x, w, scale, activations="float", device=CPU)
    x, w, scale = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, scale))
    # One rounding to bfloat16: 2^-9 of the value; float32 sums of values up to 1e3.
    np.testing.assert_allclose(np.asarray(got, np.float64), (x @ w.T) * scale, 2**-8, 1e-2)


def test_int8_activations_sum_exactly(keys):
    """Given the rounded activations, the sum is that of integers."""
    x, w, scale = arrays(keys)
    q, s = reference.quantize(x)
    sums = np.asarray(q, np.int64) @ np.asarray(w, np.int64).T
    want = (sums.astype(np.float32) * np.asarray(s) * np.asarray(scale)).astype(jnp.bfloat16)
    got = int8_matmul(x, w, scale, activations="int8", device=CPU)
    np.testing.assert_allclose(np.asarray(got, np.float32), want.astype(np.float32), 2**-7)


def test_quantized_activations_use_all_steps_and_are_half_a_step_off(keys):
    x = jax.random.normal(next(keys), (7, 96), jnp.bfloat16).at[3].set(0)
    q, s = reference.quantize(x)
    assert q.dtype == jnp.int8
    np.testing.assert_array_equal(
        np.abs(np.asarray(q, np.int32)).max(1), [127] * 3 + [0] + [127] * 3
    )
    error = np.abs(np.asarray(x, np.float32) - np.asarray(q, np.float32) * np.asarray(s))
    assert (error <= 0.501 * np.asarray(s)).all()


def test_choice_by_device_and_activations():
    table = {(d, a): choose(DEVICES[d], a) for d in DEVICES for a in ("int8", "float")}
    for (device, activations), impl in table.items():
        gpu_float = device in ("h100", "h200") and activations == "float"
        assert impl == ("reference" if device == "cpu" else "mosaic_gpu" if gpu_float else "xla")


def unchecked(f):
    """The function without jaxtyping's own checks, as users have it."""
    return getattr(f, "__wrapped__", f)


RIGHT = {
    "x_MK": SHAPE((8, 256), jnp.bfloat16),
    "w_NK": SHAPE((128, 256), jnp.int8),
    "scale_N": SHAPE((128,), jnp.float32),
}
WRONG = {
    "x_MK is int8": {"x_MK": SHAPE((8, 256), jnp.int8)},
    "x_MK has shape": {"x_MK": SHAPE((8, 128), jnp.bfloat16)},
    "w_NK is int4": {"w_NK": SHAPE((128, 256), jnp.int4)},
    r"w_NK has shape \(128,\)": {"w_NK": SHAPE((128,), jnp.int8)},
    r"w_NK has shape .*must have 3 axes": {"layer": 0},
    "no axis may be 0": {"x_MK": SHAPE((0, 256), jnp.bfloat16)},
    "scale_N is bfloat16": {"scale_N": SHAPE((128,), jnp.bfloat16)},
    r"scale_N has shape \(64,\)": {"scale_N": SHAPE((64,), jnp.float32)},
    "scale_N has shape .*1 axes": {"scale_N": SHAPE((1, 128), jnp.float32)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    f = lambda a: unchecked(int8_matmul)(**a, activations="float", device=CPU)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(f, RIGHT | WRONG[message])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int4"}, "activations is 'int4'"),
        ({"activations": "int8", "impl": "mosaic_gpu"}, "impl is 'mosaic_gpu'"),
        ({"activations": "float", "impl": "cudnn"}, "impl is 'cudnn'"),
    ],
)
def test_wrong_options_are_named(options, message):
    f = lambda a: unchecked(int8_matmul)(**a, device=H200, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(f, RIGHT)


@pytest.mark.parametrize("rows", [3, 32])
def test_wrong_groups_are_named(rows):
    f = lambda x, w, s: unchecked(int8_grouped_matmul)(x, w, s, device=CPU)
    with pytest.raises(ValueError, match=f"scale_GN has {rows} rows"):
        jax.eval_shape(f, RIGHT["x_MK"], RIGHT["w_NK"], SHAPE((rows, 128), jnp.float32))


def test_a_zero_of_another_shape_is_named():
    f = lambda x, w, s, z: unchecked(int8_grouped_matmul)(x, w, s, z, device=CPU)
    shapes = (SHAPE((2, 128), jnp.float32), SHAPE((1, 128), jnp.float32))
    with pytest.raises(ValueError, match="zero_GN has shape"):
        jax.eval_shape(f, RIGHT["x_MK"], RIGHT["w_NK"], *shapes)


def test_unsigned_numbers_less_128_are_the_same_weights(keys):
    x = jax.random.normal(next(keys), (3, 64))
    q = jax.random.randint(next(keys), (8, 64), 0, 256)
    zero = jax.random.randint(next(keys), (2, 8), 0, 256).astype(jnp.float32)
    scale = jax.random.uniform(next(keys), (2, 8), jnp.float32, 0.5, 1.5)
    got = int8_grouped_matmul(x, (q - 128).astype(jnp.int8), scale, zero - 128, device=CPU)
    spread = lambda a: np.repeat(np.asarray(a, np.float64).T, 32, 1)
    w = (np.asarray(q, np.float64) - spread(zero)) * spread(scale)
    # float32 sums of 64 products of up to 1e3.
    np.testing.assert_allclose(got, np.asarray(x, np.float64) @ w.T, 1e-5, 1e-2)
