"""fp8_matmul: rounding of activations, both kernels, XLA's share, and every refusal."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import DEVICES
from pallas_kernels.fp8_matmul import (
    cases,
    choose,
    fp8_matmul,
    mosaic_gpu,
    mosaic_gpu_quantize,
    quantize_tokens,
)
from tests.kernels.harness import GPU as INTERPRET_GPU
from tests.kernels.harness import assert_close, check_case

CPU, GPU, TPU = DEVICES["cpu"], DEVICES["h200"], DEVICES["v6e"]
BLOCKED = [c for c in cases.CASES if cases.impls(c, GPU) != ("xla",)]
PLAIN = [c for c in cases.CASES if cases.impls(c, GPU) == ("xla",)]
name = lambda case: case.name


@pytest.mark.parametrize("case", BLOCKED, ids=name)
def test_mosaic_gpu_equals_the_reference(case, keys):
    check_case("fp8_matmul", case, "mosaic_gpu", next(keys))


def test_the_gpu_rounds_activations_to_the_same_bits(keys):
    x_MK = jax.random.normal(next(keys), (70, 144), jnp.bfloat16).at[3].set(0)
    q_MK, scale_GM = mosaic_gpu_quantize.quantize(x_MK, interpret=INTERPRET_GPU)
    want_q, want_scale = quantize_tokens(x_MK, 128)
    np.testing.assert_array_equal(q_MK.view(jnp.uint8), want_q.view(jnp.uint8))
    np.testing.assert_array_equal(scale_GM[:, :70].T, want_scale)


@pytest.mark.parametrize("case", BLOCKED, ids=name)
def test_mosaic_tpu_equals_the_reference(case, keys):
    check_case("fp8_matmul", case, "mosaic_tpu", next(keys))


@pytest.mark.parametrize("name_", ["one_token", "few_partial_blocks", "many_tiles_a_core"])
def test_mosaic_tpu_without_an_fp8_matrix_unit_equals_the_reference(name_, keys):
    case = next(c for c in cases.CASES if c.name == name_)
    check_case("fp8_matmul", case, "mosaic_tpu", next(keys), device=DEVICES["v5e"])


@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_xla_equals_the_reference(case, keys):
    args = cases.inputs(case, next(keys), "xla")
    run = lambda impl, device: jax.jit(cases.call(case, impl, device))(*args)
    assert cases.impls(case, GPU) == cases.impls(case, TPU) == ("xla",)
    assert_close(run("xla", GPU), run("reference", CPU))


@pytest.mark.parametrize("group", [128, 300])
def test_quantised_tokens_lie_within_half_a_step_of_x(group, keys):
    x_MK = jax.random.normal(next(keys), (7, 300), jnp.bfloat16) * jnp.bfloat16(3)
    x_MK = x_MK.at[2].set(0)
    q_MK, scale_MG = quantize_tokens(x_MK, group)
    assert (q_MK.dtype, scale_MG.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    assert scale_MG.shape == (7, -(-300 // group))
    scale_MK = np.repeat(np.asarray(scale_MG), group, 1)[:, :300]
    x, q = np.asarray(x_MK, np.float32), np.asarray(q_MK, np.float32) * scale_MK
    # 3 bits of mantissa: half a step is 2^-4 of the value, or half the smallest subnormal.
    assert (np.abs(x - q) <= np.maximum(np.abs(x) * 2**-4, scale_MK * 2**-10) * 1.001).all()
    assert (q[2] == 0).all()
    assert np.abs(np.asarray(q_MK, np.float32)).max() == 448


def test_a_static_scale_clips_what_e4m3_cannot_hold():
    x_MK = jnp.full((1, 16), 1000.0, jnp.bfloat16)
    w_NK = jnp.eye(16, dtype=jnp.float8_e4m3fn)
    y_MN = fp8_matmul(x_MK, w_NK, jnp.float32(1), x_scale=jnp.float32(1), device=CPU)
    assert (y_MN == 448).all()


@pytest.mark.parametrize("shape", [(), (136,), (2, 2)], ids=str)
def test_float_activations_are_not_rounded(shape, keys):
    x_MK = jax.random.normal(next(keys), (3, 256))
    w_NK = jax.random.normal(next(keys), (136, 256)).astype(jnp.float8_e4m3fn)
    scale = jax.random.uniform(next(keys), shape, minval=0.5, maxval=1.5)
    y_MN = fp8_matmul(x_MK, w_NK, scale, activations="float", device=CPU)
    s = np.asarray(scale)
    s = s.repeat(128, 0)[:136].repeat(128, 1) if s.ndim == 2 else s.reshape(-1, 1)
    want = np.asarray(x_MK, np.float64) @ (np.asarray(w_NK, np.float64) * s).T
    np.testing.assert_allclose(y_MN, want, rtol=1e-5, atol=1e-4)


def test_block_scales_equal_a_product_by_hand(keys):
    """The definition, spelt out by numpy in float64 over blocks."""
    M, N, K = 3, 200, 300
    case = cases.Case("", M, N, K)
    x_MK, w_NK, w_scale = cases.inputs(case, next(keys), "reference")
    y_MN = fp8_matmul(x_MK, w_NK, w_scale, device=CPU)
    q_MK, sx_MG = (np.asarray(a, np.float64) for a in quantize_tokens(x_MK, 128))
    w_NK, w_scale = np.asarray(w_NK, np.float64), np.asarray(w_scale, np.float64)
    want = np.zeros((M, N))
    for n in range(N):
        for k in range(K):
            s_M = sx_MG[:, k // 128] * w_scale[n // 128, k // 128]
            want[:, n] += q_MK[:, k] * w_NK[n, k] * s_M
    np.testing.assert_allclose(np.asarray(y_MN, np.float64), want, rtol=2**-8, atol=1e-6)


def test_the_choice_names_what_each_device_runs():
    at = lambda device, **kw: choose(device, **{"N": 4096, "K": 4096, "blocks": True} | kw)
    assert at(CPU) == "reference"
    assert at(GPU) == "mosaic_gpu"
    assert at(TPU) == "mosaic_tpu"
    assert at(GPU, blocks=False) == at(TPU, blocks=False) == "xla"
    assert at(CPU, activations="float") == "reference"
    assert at(GPU, activations="float") == at(TPU, activations="float") == "xla"
    assert at(GPU, K=4104) == at(GPU, N=4100) == "reference"


def arguments(**changed):
    x_MK = jnp.zeros((4, 256), jnp.bfloat16)
    w_NK = jnp.zeros((136, 256), jnp.float8_e4m3fn)
    w_scale = jnp.ones((2, 2), jnp.float32)
    return {"x_MK": x_MK, "w_NK": w_NK, "w_scale": w_scale, "device": CPU} | changed


REFUSED = {
    "x_MK is int8": {"x_MK": jnp.zeros((4, 256), jnp.int8)},
    "x_MK is float32": {
        "x_MK": jnp.zeros((4, 256), jnp.float32),
        "impl": "mosaic_gpu",
        "device": GPU,
    },
    r"w_NK has shape \(136, 256\); it must have 3 axes": {"layer": 0},
    r"w_scale has shape \(3, 2, 2\); it must be \(5, 2, 2\)": {
        "w_NK": jnp.zeros((5, 136, 256), jnp.float8_e4m3fn),
        "w_scale": jnp.ones((3, 2, 2), jnp.float32),
        "layer": 0,
    },
    r"w_NK has shape \(136, 128\)": {"w_NK": jnp.zeros((136, 128), jnp.float8_e4m3fn)},
    "w_scale is bfloat16": {"w_scale": jnp.ones((2, 2), jnp.bfloat16)},
    r"w_scale has shape \(2, 3\)": {"w_scale": jnp.ones((2, 3), jnp.float32)},
    r"w_scale has shape \(2,\)": {"w_scale": jnp.ones((2,), jnp.float32)},
    "w_scale.ndim is 3": {"w_scale": jnp.ones((2, 2, 1), jnp.float32)},
    "x_scale is bfloat16": {"x_scale": jnp.bfloat16(1), "w_scale": jnp.float32(1)},
    "x_scale is given with w_scale": {"x_scale": jnp.float32(1)},
    "x_scale is given with activations": {
        "x_scale": jnp.float32(1),
        "w_scale": jnp.float32(1),
        "activations": "float",
    },
    "impl is 'mosaic_gpu'; it must be one of 'reference', 'xla'": {
        "impl": "mosaic_gpu",
        "device": GPU,
        "activations": "float",
    },
    "impl is 'cudnn'": {"impl": "cudnn"},
    "impl is 'mosaic_tpu'": {"impl": "mosaic_tpu", "device": GPU},
    "impl is 'xla'": {"impl": "xla", "device": GPU},
    "impl is 'mosaic_gpu'": {"impl": "mosaic_gpu", "device": GPU, "w_scale": jnp.float32(1)},
    "K is 264": {
        "x_MK": jnp.zeros((4, 264), jnp.bfloat16),
        "w_NK": jnp.zeros((136, 264), jnp.float8_e4m3fn),
        "w_scale": jnp.ones((2, 3), jnp.float32),
        "impl": "mosaic_gpu",
        "device": GPU,
    },
    "N is 132": {
        "w_NK": jnp.zeros((132, 256), jnp.float8_e4m3fn),
        "impl": "mosaic_gpu",
        "device": GPU,
    },
    "tiles.rows is 64": {
        "impl": "mosaic_gpu",
        "device": GPU,
        "tiles": mosaic_gpu.Tiles(64, 4, 1, 8),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_bad_argument_is_named(message):
    # Without the tests' own shape checks, which would refuse some of these first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(fp8_matmul)(**arguments(**REFUSED[message]))
