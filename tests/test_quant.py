import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.devices import DEVICES
from tests.checkpoints import GOLDENS
from xlinfer.mesh import make_mesh
from xlinfer.models.parts import matrix
from xlinfer.quant import QTensor, apart, product, together
from xlinfer.quantize import quantize, quantize_model
from xlinfer.serve.build import DEMO_MODEL
from xlinfer.weights import load_model

CPU = DEVICES["cpu"]
# Half a step of the grid over its largest number: 7, 127, and 448 with 3 bits of mantissa.
HALF_STEP = {"int4": 0.5 / 7, "int8": 0.5 / 127, "fp8": 2**-4}


def dense(q: QTensor) -> np.ndarray:
    """What a QTensor stands for, [in, out], written out as its formats say."""
    data_NK, scale = np.asarray(q.data_NK, np.float32), np.asarray(q.scale, np.float32)
    N, K = data_NK.shape
    match q.data_NK.dtype.name:
        case "int4":
            scale_NK = np.repeat(scale.T, K // scale.shape[0], 1)
        case "int8":
            scale_NK = scale[:, None]
        case _:
            scale_NK = np.repeat(np.repeat(scale, 128, 0)[:N], 128, 1)[:, :K]
    return (data_NK * scale_NK).T


@pytest.mark.parametrize("method", HALF_STEP)
def test_rounding_is_within_half_a_step_of_the_group(method, keys):
    w = jax.random.normal(next(keys), (256, 200))
    q = quantize(w, method, CPU)
    groups = {"int4": (128, 1), "int8": (256, 1), "fp8": (128, 128)}[method]
    largest = np.zeros(w.shape, np.float32)
    for i in range(0, 256, groups[0]):
        for j in range(0, 200, groups[1]):
            block = np.s_[i : i + groups[0], j : j + groups[1]]
            largest[block] = np.abs(w[block]).max()
    assert (np.abs(dense(q) - w) <= largest * HALF_STEP[method] * 1.001).all()


def test_zeros_stay_zeros():
    for method in HALF_STEP:
        q = quantize(jnp.zeros((128, 8)), method, CPU)
        assert not dense(q).any() and np.isfinite(np.asarray(q.scale, np.float32)).all()


@pytest.mark.parametrize("method", ["int4", "int8"])
def test_product_is_the_dense_product_of_what_is_stored(method, keys):
    param = matrix(nnx.Rngs(0), jnp.float32, ("hidden", "ffw"), 128, 24)
    x = jax.random.normal(next(keys), (2, 3, 128))
    np.testing.assert_allclose(product(x, param), x @ param[...], atol=1e-5)
    q = quantize(param[...], method, CPU)
    got = product(x, param.replace(q))
    np.testing.assert_allclose(got, x @ jnp.asarray(dense(q)), atol=1e-5)


def test_fp8_rounds_the_activations_too(keys):
    param = matrix(nnx.Rngs(0), jnp.float32, ("hidden", "ffw"), 128, 64)
    q = quantize(param[...], "fp8", CPU)
    x = jax.random.normal(next(keys), (5, 128)).astype(jnp.bfloat16)
    got = np.asarray(product(x, param.replace(q)), np.float32)
    want = np.asarray(x, np.float32) @ dense(q)
    assert 0 < np.abs(got - want).max() < np.abs(want).max() * 2**-4


def test_a_scan_leaves_quantized_weights_whole(keys):
    w = jax.random.normal(next(keys), (3, 128, 16))
    q = quantize(w, "int4", CPU)
    state = {"norm": jnp.ones((3, 4)), "w": q}
    sliced, whole = apart(state)
    assert sliced == {"norm": state["norm"], "w": None}
    one = together(jax.tree.map(lambda x: x[1], sliced), whole, jnp.int32(1))
    param = matrix(nnx.Rngs(0), jnp.float32, ("hidden", "ffw"), 128, 16)
    x = jax.random.normal(next(keys), (2, 128))
    alone = quantize(w[1], "int4", CPU)
    got, want = product(x, param.replace(one["w"])), product(x, param.replace(alone))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
def test_a_quantized_model_still_models(method, heldout_ids):
    """Log-likelihood of held-out text, in nats a token: what rounding may cost the demo model."""
    model = load_model(DEMO_MODEL)
    loss = lambda m: float(_loss(m, heldout_ids))
    before = loss(model)
    quantize_model(model, method, CPU)
    flat = nnx.to_flat_state(nnx.state(model))
    assert sum(isinstance(p.get_value(), QTensor) for _, p in flat) == 7
    assert abs(loss(model) - before) < {"int4": 0.3, "int8": 0.02, "fp8": 0.1}[method]


@pytest.fixture(scope="module")
def heldout_ids():
    from pathlib import Path

    from xlinfer.serve.tokenizer import Tokenizer

    text = (Path(__file__).parent / "data" / "heldout.txt").read_text()
    return jnp.asarray(Tokenizer.open(str(DEMO_MODEL)).encode(text)[:256], jnp.int32)


def _loss(model, ids_T):
    log_p_TV = jax.nn.log_softmax(model(ids_T[None])[0, :-1])
    return -jnp.take_along_axis(log_p_TV, ids_T[1:, None], 1).mean()


def test_abstract_models_are_quantized_without_weights(keys):
    from xlinfer.models import Transformer

    real = load_model(DEMO_MODEL)
    abstract = nnx.eval_shape(lambda: Transformer(real.cfg, rngs=nnx.Rngs(0)))
    quantize_model(abstract, "int4", CPU)
    quantize_model(real, "int4", CPU)
    shape = lambda x: (x.shape, x.dtype)
    got, want = (jax.tree.map(shape, nnx.state(m)) for m in (abstract, real))
    assert jax.tree.leaves(got) == jax.tree.leaves(want)


def test_bad_choices_are_named():
    model = load_model(DEMO_MODEL)
    with pytest.raises(ValueError, match="quantization is 'int3'; it must be one of 'int4'"):
        quantize_model(model, "int3", CPU)
    with pytest.raises(ValueError, match="matmul_impl is 'fast'"):
        quantize_model(model, "int4", CPU, "fast")
    with pytest.raises(ValueError, match="matmul_impl is 'mosaic_gpu', which runs on cuda"):
        quantize_model(model, "int4", CPU, "mosaic_gpu")
    quantize_model(model, "int4", CPU)
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_model(model, "int4", CPU)
    with pytest.raises(ValueError, match="has no weight that can be quantized"):
        quantize_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "int4", CPU)


@pytest.mark.parametrize("method", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_model_on_several_devices_is_quantized_where_it_lies(method, heldout_ids):
    alone, spread = load_model(DEMO_MODEL), load_model(DEMO_MODEL, mesh=make_mesh(2))
    for model in (alone, spread):
        quantize_model(model, method, CPU)
    np.testing.assert_allclose(spread(heldout_ids[None]), alone(heldout_ids[None]), atol=1e-4)
    flat = nnx.to_flat_state(nnx.state(spread))
    split = [q.data_NK for _, p in flat if isinstance(q := p.get_value(), QTensor)]
    assert len(split) == 7 and all(not a.sharding.is_fully_replicated for a in split)


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("devices", [1, 2])
def test_weights_rounded_as_they_are_read_are_those_rounded_at_once(method, devices):
    mesh = make_mesh(devices)
    at_once = load_model(DEMO_MODEL, mesh=mesh)
    try:
        quantize_model(at_once, method, CPU)
    except ValueError as error:
        with pytest.raises(ValueError) as same:
            load_model(DEMO_MODEL, mesh=mesh, quantization=method)
        assert str(same.value) == str(error) and method == "fp8" and devices == 2
        return
    got = load_model(DEMO_MODEL, mesh=mesh, quantization=method)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(got), nnx.state(at_once))
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (got, at_once)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_matrices_of_an_encoder_and_its_decoder_are_rounded(name):
    model, at_once = (load_model(GOLDENS / name, quantization=q) for q in ("int8", None))
    quantize_model(at_once, "int8", CPU)
    got, want = (nnx.to_flat_state(nnx.state(m)) for m in (model, at_once))
    assert sum(isinstance(p.get_value(), QTensor) for _, p in got) > 12
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert isinstance(a.get_value(), QTensor) == isinstance(b.get_value(), QTensor), path
        jax.tree.map(np.testing.assert_array_equal, a.get_value(), b.get_value())
