"""The forward pass against transformers' logits and against a float64 transcription."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from converters.families import parse_config
from pallas_kernels.devices import DEVICES
from tests.checkpoints import FAMILIES, GOLDENS, MULTIMODAL, config, llama_logits, tensors, write
from xlinfer.mesh import make_mesh
from xlinfer.models import Transformer
from xlinfer.weights import load_model

ATOL = {
    "golden": 2e-4,  # float32 against transformers' float32: two orders of summation
    "reference": 5e-5,  # float32 against float64, logits of a few units
    "same": 2e-5,  # float32 against float32: only the order of summation differs
}


DEVICE_COUNTS = (1, 2, 4)


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
    "devices", [pytest.param(n, marks=pytest.mark.slow if n == 2 else ()) for n in DEVICE_COUNTS]
)
def test_logits_equal_transformers(golden, devices):
    """Two kv heads on four devices: each is held twice."""
    folder, want = golden
    model = load_model(folder, mesh=make_mesh(devices))
    got = forward(model, want["input_ids"].astype(np.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want["logits"], atol=ATOL["golden"], rtol=0)


def test_the_whole_twin_of_the_malformed_ones_is_read():
    """Of those in tests/data/malformed."""
    folder = GOLDENS / "control-float"
    want = load_file(folder / "golden.safetensors")
    got = forward(load_model(folder), want["input_ids"].astype(np.int32))
    np.testing.assert_allclose(got, want["logits"], atol=ATOL["golden"], rtol=0)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_models_logits_equal_transformers(name, caplog):
    folder = GOLDENS / name
    want = load_file(folder / "golden.safetensors")
    model = load_model(folder, text_only=True)
    got = forward(model, want["input_ids"].astype(np.int32))
    np.testing.assert_allclose(got, want["logits"], atol=ATOL["golden"], rtol=0)
    left_out = [record.getMessage() for record in caplog.records]
    vision = "vision_model" if name == "llama4-images" else "vision_tower"
    assert len(left_out) == 2 and f"left out {vision}: " in left_out[1]


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


def dense(
    q_BTNH, k_BTKH, v_BTKH, kv, *,
    layer, window, attention_chunk_size, scale, softcap, sinks_N, alibi_N, kv_scales,
):  # fmt: skip
    """Attention with every logit at once, as one writes it down; of what families have alone,
    nothing."""
    assert attention_chunk_size is None and softcap is None and kv_scales is None
    assert sinks_N is None and alibi_N is None
    T, G = q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2]
    k_BTNH, v_BTNH = (jnp.repeat(x, G, axis=2) for x in (k_BTKH, v_BTKH))
    behind_TS = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    seen_TS = (behind_TS >= 0) & (behind_TS < window)
    s_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) * scale
    p_BNTS = jax.nn.softmax(jnp.where(seen_TS, s_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS, v_BTNH), kv


T = 530  # longer than two of the reference's blocks


@pytest.fixture
def tokens_BT():
    return jnp.asarray(np.random.default_rng(4).integers(0, 64, (1, T)), jnp.int32)


@jax.jit
def by_formula(model, tokens_BT):
    x_BTD, _ = model.hidden(tokens_BT, jnp.arange(T)[None], dense, None, context_len=T)
    return model.logits(x_BTD)


def sliding(folder, *kinds):
    """A checkpoint whose windows, where there are any, cut within one block and skip another."""
    cfg = config(
        model_type="qwen3", max_position_embeddings=600, use_sliding_window=True,
        sliding_window=70, layer_types=[f"{kind}_attention" for kind in kinds],
    )  # fmt: skip
    return write(folder, cfg, tensors(cfg))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "kinds", [("full",) * 2, ("sliding",) * 2, ("sliding", "full")], ids=" ".join
)
def test_the_forward_is_dense_attentions(kinds, devices, tokens_BT, tmp_path):
    """One window for all layers, which is a constant, or not; on devices that share the heads."""
    folder = sliding(tmp_path, *kinds)
    got = forward(load_model(folder, mesh=make_mesh(devices)), tokens_BT)
    want = by_formula(load_model(folder), tokens_BT)
    np.testing.assert_allclose(got, want, atol=ATOL["same"], rtol=0)


@pytest.mark.slow
def test_the_gradient_is_dense_attentions(tokens_BT, tmp_path):
    folder = sliding(tmp_path, "sliding", "full")

    def gradient(of, model):
        loss = lambda model: jax.nn.log_softmax(of(model, tokens_BT))[..., 0].mean()
        return jax.tree.leaves(jax.jit(jax.grad(loss))(model))

    got = gradient(forward, load_model(folder, mesh=make_mesh(2)))
    want = gradient(by_formula, load_model(folder))
    for g, w in zip(got, want, strict=True):
        largest = np.abs(w).max()
        assert largest > 0
        np.testing.assert_allclose(g / largest, w / largest, atol=ATOL["same"], rtol=0)


def test_a_models_structure_is_a_value():
    """Two that were loaded alike are one to jax.jit, and what kernels are chosen for is in it."""
    structure = lambda devices: nnx.graphdef(load_model(GOLDENS / "llama", mesh=make_mesh(devices)))
    assert structure(2) == structure(2) and hash(structure(2)) == hash(structure(2))
    assert structure(2) != structure(1)
    of = lambda name: nnx.graphdef(
        nnx.eval_shape(
            lambda: Transformer(
                load_model(GOLDENS / "llama").cfg, device=DEVICES[name], rngs=nnx.Rngs(0)
            )
        )
    )
    assert of("h200") == of("h200") != of("v6e")


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
    _, forward_slope = jax.jvp(at, (0.0,), (1.0,))
    np.testing.assert_allclose(forward_slope, slope, rtol=1e-4)


def test_later_tokens_do_not_reach_earlier_ones(model):
    tokens_BT = np.random.default_rng(3).integers(0, 160, (1, 10)).astype(np.int32)
    changed = tokens_BT.copy()
    changed[0, 7] += 1
    a, b = forward(model, tokens_BT)[0], forward(model, changed % 160)[0]
    np.testing.assert_array_equal(a[:7], b[:7])
    assert jnp.abs(a[7:] - b[7:]).max() > 1e-2
