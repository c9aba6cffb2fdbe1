"""The forward pass against transformers' logits and against a float64 transcription."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from converters.families import parse_config
from tests.checkpoints import FAMILIES, GOLDENS, config, llama_logits, tensors, write
from xlinfer.mesh import make_mesh
from xlinfer.weights import load_model

ATOL = {
    "golden": 2e-4,  # float32 against transformers' float32: two orders of summation
    "reference": 5e-5,  # float32 against float64, logits of a few units
    "same": 2e-5,  # float32 against float32: only the order of summation differs
}


@jax.jit
def forward(model, tokens_BT):
    return model(tokens_BT)


@pytest.fixture(params=FAMILIES)
def golden(request):
    folder = GOLDENS / request.param
    return folder, load_file(folder / "golden.safetensors")


@pytest.fixture
def model():
    return load_model(GOLDENS / "llama")


def default_frequencies(cfg):
    theta, H = cfg["rope_parameters"]["rope_theta"], cfg["head_dim"]
    return theta ** -(np.arange(0, H, 2) / H)


@pytest.mark.parametrize(
    "style, devices",
    [("config.json", 1), ("config.json", 2), ("config.json", 4), ("config_v4.json", 1)],
)
def test_logits_equal_transformers(golden, style, devices, tmp_path):
    """Two kv heads on four devices: each is held twice."""
    folder, want = golden
    shutil.copy(folder / style, tmp_path / "config.json")
    shutil.copy(folder / "model.safetensors", tmp_path)
    model = load_model(tmp_path, mesh=make_mesh(devices))
    got = forward(model, want["input_ids"].astype(np.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want["logits"], atol=ATOL["golden"], rtol=0)


def test_both_config_styles_say_the_same(golden):
    folder, _ = golden
    five, four = (folder / name for name in ("config.json", "config_v4.json"))
    assert parse_config(five, json.loads(five.read_text())) == parse_config(
        four, json.loads(four.read_text())
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "head_dim": 4},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "attention_bias": True},
        {"model_type": "mistral", "sliding_window": 3},
        {"model_type": "mistral", "sliding_window": None},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 2,
            "max_window_layers": 1,
        },
        {
            "model_type": "qwen3",
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_variants_equal_the_formulas(changes, tmp_path):
    cfg = config(**changes)
    held = tensors(cfg)
    window, layers = cfg.get("sliding_window"), cfg["num_hidden_layers"]
    kinds = cfg.get("layer_types") or [
        "sliding_attention" if i >= cfg.get("max_window_layers", 0) else "full_attention"
        for i in range(layers)
    ]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    tokens_T = np.random.default_rng(1).integers(0, cfg["vocab_size"], 12)
    want = llama_logits(cfg, held, tokens_T, default_frequencies(cfg), windows=windows)
    got = forward(load_model(write(tmp_path, cfg, held)), tokens_T[None].astype(np.int32))[0]
    np.testing.assert_allclose(got, want, atol=ATOL["reference"], rtol=0)


def test_jit_vmap_and_grad_apply(model):
    tokens_BT = jnp.asarray(np.random.default_rng(2).integers(0, 160, (3, 9)).astype(np.int32))
    want = model(tokens_BT)
    jitted = forward(model, tokens_BT)
    np.testing.assert_allclose(jitted, want, atol=ATOL["same"], rtol=0)
    mapped = jax.jit(jax.vmap(lambda tokens_T: model(tokens_T[None])[0]))(tokens_BT)
    np.testing.assert_allclose(mapped, want, atol=ATOL["same"], rtol=0)

    @jax.jit
    def loss(model):
        logp = jax.nn.log_softmax(model(tokens_BT)[:, :-1])
        return -jnp.take_along_axis(logp, tokens_BT[:, 1:, None], axis=-1).mean()

    grads = jax.jit(jax.grad(loss))(model)
    norms = [jnp.abs(leaf).max() for leaf in jax.tree.leaves(grads)]
    assert len(norms) == 12 and all(0 < norm < 100 for norm in norms)
    # The slope along one weight, measured: a step of 1e-2 balances curvature against rounding.
    step = 1e-2

    def at(shift):
        moved = nnx.clone(model)
        moved.norm.scale_D.set_value(model.norm.scale_D.get_value() + shift)
        return loss(moved)

    measured = (at(step) - at(-step)) / (2 * step)
    slope = grads.norm.scale_D.get_value().sum()
    np.testing.assert_allclose(measured, slope, rtol=1e-2)


def test_later_tokens_do_not_reach_earlier_ones(model):
    tokens_BT = np.random.default_rng(3).integers(0, 160, (1, 10)).astype(np.int32)
    changed = tokens_BT.copy()
    changed[0, 7] += 1
    a, b = forward(model, tokens_BT)[0], forward(model, changed % 160)[0]
    np.testing.assert_array_equal(a[:7], b[:7])
    assert jnp.abs(a[7:] - b[7:]).max() > 1e-2
