"""Scales of an 8-bit KV cache, in every name that files have for them."""

import ml_dtypes
import numpy as np
import pytest

from converters import CheckpointError, open_checkpoint
from tests.checkpoints import config, tensors, write
from xlinfer.weights import load_model

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
CT = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}
MODELOPT = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
K, V = (0.25, 3.0), (0.5, 0.007)  # of each layer
LAYERS = 2


def f32(values) -> np.ndarray:
    return np.array(values, np.float32)


def named(k: str, v: str, shape=(1,), dtype=np.float32) -> dict[str, np.ndarray]:
    return {
        f"model.layers.{layer}.self_attn.{name}": np.full(shape, value[layer], dtype)
        for name, value in ((k, K), (v, V))
        for layer in range(LAYERS)
    }


def checkpoint(folder, quantization, scales, **files):
    given = {} if quantization is None else {"quantization_config": quantization}
    return write(folder, cfg := config(**given), tensors(cfg) | scales, **files)


def scales_of(model) -> list[np.ndarray]:
    attn = model.layers[0].attn
    return [np.asarray(x[...]) for x in (attn.k_scale_K, attn.v_scale_K)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    "quantization, k, v",
    [
        (CT, "k_scale", "v_scale"),
        (CT, "k_proj.output_scale", "v_proj.output_scale"),
        (MODELOPT, "k_proj.k_scale", "v_proj.v_scale"),
    ],
)
def test_each_format_has_its_names(tmp_path, quantization, k, v, shape, dtype):
    model = load_model(checkpoint(tmp_path, quantization, named(k, v, shape, dtype)))
    for found, want in zip(scales_of(model), (K, V), strict=True):
        of_each = np.array(want).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(found, np.stack([of_each] * 2, 1))
        assert found.dtype == np.float32


def test_one_scale_of_both(tmp_path):
    """AutoFP8's."""
    held = {f"model.layers.{i}.self_attn.kv_scale": f32(K[i]) for i in range(LAYERS)}
    held = {name: np.array(x) for name, x in held.items()}
    for found in scales_of(load_model(checkpoint(tmp_path, CT, held))):
        np.testing.assert_array_equal(found, f32([[K[0]] * 2, [K[1]] * 2]))


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1)])
def test_scales_by_kv_head(tmp_path, shape):
    held = {
        f"model.layers.{layer}.self_attn.{part}_scale": (
            f32([0.5, 0.125]).reshape(shape) * f32(1 + layer)
        )
        for part in "kv"
        for layer in range(LAYERS)
    }
    quantization = CT | {"kv_cache_scheme": SCHEME | {"strategy": "attn_head"}}
    for found in scales_of(load_model(checkpoint(tmp_path, quantization, held))):
        np.testing.assert_array_equal(found, f32([[0.5, 0.125], [1.0, 0.25]]))


def test_a_config_beside_config_json(tmp_path):
    inner = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    folder = checkpoint(
        tmp_path, None, named("k_proj.k_scale", "v_proj.v_scale", ()),
        hf_quant_config={"producer": {"name": "modelopt"}, "quantization": inner},
    )  # fmt: skip
    np.testing.assert_array_equal(scales_of(load_model(folder))[1][:, 0], f32(V))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "kv_cache_scheme": "static"},
        {**CT, "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float",
         "strategy": "channel"}, "targets": ["Linear"], "format": "float-quantized"}}},
    ],
)  # fmt: skip
def test_beside_quantized_weights(tmp_path, quantization):
    wide = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    folder = write(tmp_path, config(**wide, quantization_config=quantization), {})
    assert open_checkpoint(folder).config.kv_scales
    quantization = {n: x for n, x in quantization.items() if not n.startswith("kv_cache")}
    folder = write(tmp_path, config(**wide, quantization_config=quantization), {})
    assert not open_checkpoint(folder).config.kv_scales


def test_a_missing_scale_is_1_and_said(tmp_path, caplog):
    held = named("k_scale", "v_scale")
    del held["model.layers.1.self_attn.k_scale"]
    k_scale, v_scale = scales_of(load_model(checkpoint(tmp_path, CT, held)))
    assert "1 of 4 scales of the KV cache are missing: they are 1.0" in caplog.text
    np.testing.assert_array_equal(k_scale[:, 0], f32([K[0], 1]))
    np.testing.assert_array_equal(v_scale[:, 0], f32(V))


def test_scales_of_products_are_left_out_and_named(tmp_path, caplog):
    at = "model.layers.0.self_attn"
    one = np.ones(1, np.float32)
    names = (f"{at}.q_scale", f"{at}.prob_scale", f"{at}.output_scale", f"{at}.q_proj.output_scale")
    held = named("k_scale", "v_scale") | dict.fromkeys(names, one)
    np.testing.assert_array_equal(
        scales_of(load_model(checkpoint(tmp_path, CT, held)))[0][:, 0], f32(K)
    )
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in names[:3])
    # Of k and v they are scales of the cache, and no others.
    both = held | {f"{at}.k_proj.output_scale": one}
    with pytest.raises(CheckpointError, match=r"of which one is meant: .*k_scale and .*output_sc"):
        load_model(checkpoint(tmp_path, CT, both))


@pytest.mark.parametrize("value", [-0.5, 0.0, np.nan, np.inf])
def test_a_scale_that_is_none_is_refused(tmp_path, value):
    held = named("k_scale", "v_scale")
    held["model.layers.1.self_attn.v_scale"] = f32([value])
    says = rf"layers\.1\.self_attn\.v_scale holds {value:g}; a scale must be finite and above 0"
    with pytest.raises(CheckpointError, match=says):
        load_model(checkpoint(tmp_path, CT, held))


@pytest.mark.parametrize("shape", [(3,), (2, 1), (4, 1, 1)])
def test_another_shape_is_refused(tmp_path, shape):
    held = named("k_scale", "v_scale", shape)
    with pytest.raises(CheckpointError, match=r"k_scale has shape .* asks for \[\] or \[1\] or \["):
        load_model(checkpoint(tmp_path, CT, held))


def test_scales_that_no_config_speaks_of_are_refused(tmp_path):
    folder = checkpoint(tmp_path, None, named("k_scale", "v_scale"))
    with pytest.raises(CheckpointError, match="are read where the quantization_config says kv_cac"):
        load_model(folder)


@pytest.mark.parametrize(
    "quantization, says",
    [
        (CT | {"kv_cache_scheme": SCHEME | {"type": "int"}}, "has type 'int'; xlinfer reads 'floa"),
        (CT | {"kv_cache_scheme": SCHEME | {"num_bits": 4}}, "has num_bits 4; xlinfer reads 8"),
        (CT | {"kv_cache_scheme": SCHEME | {"dynamic": True}}, "has dynamic True"),
        (CT | {"kv_cache_scheme": SCHEME | {"symmetric": False}}, "has symmetric False"),
        (CT | {"kv_cache_scheme": SCHEME | {"strategy": "channel"}}, "has strategy 'channel'"),
        (CT | {"kv_cache_scheme": "dynamic"}, "'kv_cache_scheme' is 'dynamic'; it must be an obj"),
        (MODELOPT | {"kv_cache_quant_algo": "NVFP4"}, "'NVFP4'; xlinfer reads 'FP8' and null"),
        (CT | {"kv_cache_scheme": None}, "must name at least one group"),
    ],
)
def test_another_cache_is_refused(tmp_path, quantization, says):
    folder = write(tmp_path, config(quantization_config=quantization), {})
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder)
