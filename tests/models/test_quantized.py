"""Quantized checkpoints, as the formats' own libraries wrote them, against the logits that
transformers computes with the same weights dequantized (tests/data/quantized)."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from converters import read_config, read_model, read_scheme, weight_forms
from tests.checkpoints import GOLDENS, QUANTIZED, quantized_golden
from xlinfer.engine.engine import Engine
from xlinfer.mesh import make_mesh
from xlinfer.quant import QTensor, dequantize
from xlinfer.request import Request, SamplingParams
from xlinfer.weights import load_model

ATOL = 2e-4  # float32 against transformers' float32: two orders of summation
# Where inputs are rounded too, one that lies between two numbers may go either way, and moves a
# logit by far more than summation does; logits vary by 1.4.
ATOL_RMS = 5e-3
ROUNDED_INPUTS = ("ct-fp8-dynamic", "ct-w8a8-int8-dynamic", "fp8-block-qwen3")
# The others' golden tokens are those of inputs that are not rounded.
WEIGHTS_ONLY = [n for n in QUANTIZED if n not in ROUNDED_INPUTS]
SPLIT = ("ct-w4a16-sym-g32", "gptq-v1-asym-actorder-g32", "mxfp4-gpt-oss")
DEVICE_COUNTS = (2, 4)
SPLIT_QUICK = {("gptq-v1-asym-actorder-g32", 4), ("mxfp4-gpt-oss", 2)}
QUICK = ("mxfp4-gpt-oss", "gguf-q4_k_m")


def logits_differ(model, golden) -> tuple[float, float]:
    """The largest difference and its root mean square."""
    want = golden.get("logits_act", golden["logits"])
    difference = np.asarray(model(jnp.asarray(golden["input_ids"]))) - want
    return float(np.abs(difference).max()), float(np.sqrt((difference**2).mean()))


def held(model) -> dict[tuple, QTensor]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {path: q for path, p in flat if isinstance(q := p.get_value(), QTensor)}


@pytest.mark.parametrize("style", ["config.json", "config_v4.json"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_logits_are_those_of_the_dequantized_weights(name, style, tmp_path):
    folder = tmp_path / name
    shutil.copytree(quantized_golden(name), folder)
    if QUANTIZED[name][0] != "gguf":
        (folder / style).rename(folder / "config.json")
    elif style == "config_v4.json":
        return  # a GGUF has no config.json of either style
    golden = load_file(folder / "golden.safetensors")
    model = load_model(folder)
    largest, rms = logits_differ(model, golden)
    assert rms < ATOL_RMS if "logits_act" in golden else largest < ATOL
    # gpt-oss: the experts of two stacks; GGUF: embedding and head too, and Q4_K_M in two stacks.
    count = {"mxfp4-gpt-oss": 4, "gguf-q4_k_m": 16, "gguf-q4_0": 9, "gguf-q8_0": 9}.get(name, 7)
    assert len(held(model)) == count, "they stay packed"


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_plan_knows_the_forms_without_the_weights(name):
    folder = quantized_golden(name)
    document = read_config(folder)
    config = read_model(folder / "config.json", document)
    forms = weight_forms(config, read_scheme("config.json", document), "config.json")
    assert forms == {path: q.form for path, q in held(load_model(folder)).items()}


@pytest.mark.parametrize(
    "name, dtype", [("mxfp4-gpt-oss", jnp.bfloat16), ("gguf-q4_0", jnp.float16)]
)
def test_scales_that_16_bits_hold_are_kept_in_them(name, dtype):
    """Where activations have them: kernels take scales of their inputs' dtype, or of float32."""
    wide, narrow = (held(load_model(quantized_golden(name), dtype=d)) for d in ("float32", dtype))
    for path, q in narrow.items():
        assert q.scale.dtype == (dtype if q.form.scale_dtype == np.dtype(dtype).name else "float32")
        np.testing.assert_array_equal(q.scale.astype(jnp.float32), wide[path].scale)
    assert any(q.scale.dtype == dtype for q in narrow.values())


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in WEIGHTS_ONLY],
)
def test_greedy_tokens_through_the_engine(name):
    golden = load_file(quantized_golden(name) / "golden.safetensors")
    model = load_model(quantized_golden(name))
    engine = Engine(model, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, page_size=4)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    for i, prompt in enumerate(golden["input_ids"].tolist()):
        engine.add_request(
            Request(request_id=str(i), prompt_token_ids=tuple(prompt), sampling=greedy)
        )
    tokens: dict[str, list[int]] = {"0": [], "1": []}
    while engine.has_work:
        for out in engine.step():
            tokens[out.request_id] += out.token_ids
    assert [tokens["0"], tokens["1"]] == golden["greedy"].tolist()


@pytest.mark.parametrize(
    "name, devices",
    [
        case if case in SPLIT_QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(SPLIT, DEVICE_COUNTS)
    ],
)
def test_logits_on_several_devices(name, devices):
    golden = load_file(quantized_golden(name) / "golden.safetensors")
    model = load_model(quantized_golden(name), mesh=make_mesh(devices))
    largest, _ = logits_differ(model, golden)
    assert largest < ATOL
    for path, q in held(model).items():
        shard = q.data_NK.sharding.shard_shape(q.data_NK.shape)
        assert np.prod(shard) * devices == q.data_NK.size, f"{path} is divided"
    jax.block_until_ready(nnx.state(model))


def test_deepseek_in_fp8_as_it_is_published(tmp_path, caplog):
    """Every matrix in blocks of 128 x 128, most of them partial; kv_b is needed in floats."""
    source, folder = GOLDENS / "deepseek-v3", tmp_path / "fp8"
    shutil.copytree(source, folder)
    document = json.loads((folder / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(document | {"quantization_config": fp8}))
    rng, tensors, dense = np.random.default_rng(0), {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        tensors[name] = dense[name] = w
        if w.ndim != 2 or "_proj" not in name:
            continue
        N, K = w.shape
        scale = rng.uniform(0.01, 0.02, (-(-N // 128), -(-K // 128))).astype(np.float32)
        wide = np.repeat(np.repeat(scale, 128, 0)[:N], 128, 1)[:, :K]
        tensors[name] = (w / wide).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        dense[name] = tensors[name].astype(np.float32) * wide
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder)
    assert "v_b_NCW is kept in float32: its halves multiply" in caplog.text

    plain = tmp_path / "float"
    shutil.copytree(source, plain)
    save_file(dense, plain / "model.safetensors")
    want = dict(nnx.to_flat_state(nnx.state(load_model(plain))))
    packed = 0
    for path, param in nnx.to_flat_state(nnx.state(model)):
        value, floats = param.get_value(), np.asarray(want[path].get_value())
        if isinstance(value, QTensor):
            packed += 1
            layers = [dequantize(value.of_layer(jnp.int32(i)).sliced()) for i in range(len(floats))]
            value = np.stack(layers)
            value = value if value.ndim == 4 else value.swapaxes(-1, -2)  # experts are [E, N, K]
        np.testing.assert_allclose(value, floats, rtol=1e-6, atol=0)
    assert packed > 8
