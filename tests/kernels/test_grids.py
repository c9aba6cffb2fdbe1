import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.grids import values, values_by_bits


@pytest.mark.parametrize(
    ("compute", "dtype"),
    [
        *((values, dtype) for dtype in ("bfloat16", "float16", "float32")),
        (values_by_bits, "bfloat16"),
    ],
)
def test_e2m1_is_that_of_ml_dtypes_in_half_steps(compute, dtype):
    code = np.arange(16, dtype=np.uint8)
    q = np.where(code & 8, -1, 1) * (code & 7)
    got = jax.jit(lambda q: compute(q, "e2m1"))(jnp.asarray(q, dtype))
    want = code.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * 2
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def test_a_codebook_is_looked_up():
    codebook = tuple(float(n) for n in np.random.default_rng(0).normal(size=16))
    q = np.random.default_rng(1).permutation(np.arange(64) % 16)
    got = jax.jit(lambda q: values(q, codebook))(jnp.asarray(q, jnp.float32))
    np.testing.assert_array_equal(got, np.asarray(codebook, np.float32)[q])
