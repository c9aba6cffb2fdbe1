"""Mixtures of experts against a loop over experts, and what holds of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pallas_kernels.devices import DEVICES
from tests.checkpoints import GOLDENS, config, llama_logits, tensors, write
from xlinfer.config import ExpertGroups
from xlinfer.mesh import make_mesh
from xlinfer.models.moe import MoE, _of_the_best
from xlinfer.quant import QTensor
from xlinfer.quantize import quantize_model
from xlinfer.weights import load_model

CPU = DEVICES["cpu"]
ATOL = {
    "reference": 5e-5,  # float32 against float64, logits of a few units
    "same": 2e-5,  # float32 against float32: only the order of summation differs
}


@jax.jit
def forward(model, tokens_BT):
    return model(tokens_BT)


@pytest.mark.parametrize("devices, own", [(1, 1), (4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2_moe"},
        {"model_type": "qwen2_moe", "norm_topk_prob": True, "qkv_bias": True},
        {"model_type": "qwen3_moe"},
        {"model_type": "qwen3_moe", "norm_topk_prob": True, "num_experts_per_tok": 1},
        {"model_type": "qwen3_moe", "num_experts_per_tok": 8, "attention_bias": True},
        {"model_type": "mixtral", "tie_word_embeddings": True},
    ],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)
def test_variants_equal_a_loop_over_experts(changes, devices, own, tmp_path):
    cfg = config(**changes)
    held = tensors(cfg)
    tokens_T = np.random.default_rng(1).integers(0, cfg["vocab_size"], 12)
    freq_h = 1000.0 ** -(np.arange(0, 8, 2) / 8)
    want = llama_logits(cfg, held, tokens_T, freq_h)
    mesh = make_mesh(devices, expert_parallel_size=own)
    model = load_model(write(tmp_path, cfg, held), mesh=mesh)
    got = forward(model, tokens_T[None].astype(np.int32))[0]
    np.testing.assert_allclose(got, want, atol=ATOL["reference"], rtol=0)


@pytest.mark.parametrize("family", ["gpt-oss", "deepseek-v3"])  # biases; a shared expert
def test_devices_may_share_experts(family):
    golden = load_file(GOLDENS / family / "golden.safetensors")
    model = load_model(GOLDENS / family, mesh=make_mesh(4, expert_parallel_size=2))
    placed = model.layers[-1].moe.gate_up_EID.get_value().sharding.spec
    assert tuple(placed)[1:3] == ("expert", "tensor")
    got = forward(model, golden["input_ids"])
    np.testing.assert_allclose(got, golden["logits"], atol=ATOL["reference"], rtol=0)


def test_quantized_experts_are_shared_by_whole_groups(tmp_path):
    """Each device multiplies whole groups, and gates by their own ups."""
    cfg = config(model_type="qwen3_moe", moe_intermediate_size=512)
    folder = write(tmp_path, cfg, tensors(cfg))
    tokens_BT = np.arange(12, dtype=np.int32)[None]
    one, shared = (
        forward(load_model(folder, quantization="int4", mesh=mesh), tokens_BT)
        for mesh in (make_mesh(1), make_mesh(4, expert_parallel_size=1))
    )
    np.testing.assert_allclose(np.asarray(shared), np.asarray(one), atol=ATOL["same"], rtol=0)
    cfg = config(model_type="qwen3_moe", moe_intermediate_size=384)
    folder = write(tmp_path / "odd", cfg, tensors(cfg))
    with pytest.raises(
        ValueError, match=r"down_EDI \[16, 384\] is int4 by groups of 128, and .*whole"
    ):
        load_model(folder, quantization="int4", mesh=make_mesh(4, expert_parallel_size=2))


@jax.jit
def apply(moe, x_BTD):
    return moe(x_BTD)


def experts(model) -> MoE:
    assert isinstance(model.layers[0].moe, MoE)
    return model.layers[0].moe


def block(devices=1) -> MoE:
    """The experts of one layer of the golden."""
    graph, state = nnx.split(experts(load_model(GOLDENS / "qwen3-moe", mesh=make_mesh(devices))))
    return nnx.merge(graph, jax.tree.map(lambda x: x[1], state))


@pytest.mark.parametrize("devices", [1, 4])
def test_a_tokens_bits_do_not_depend_on_its_neighbours(devices, keys):
    """Whoever shares the bucket may send any number of rows to this token's experts."""
    moe = block(devices)
    x_D = jax.random.normal(next(keys), (32,))
    neighbours = (
        jnp.zeros((15, 32)),
        jnp.broadcast_to(x_D, (15, 32)),
        jax.random.normal(next(keys), (15, 32)),
    )
    got = {
        np.asarray(apply(moe, jnp.insert(others, at, x_D, axis=0)[None])[0, at]).tobytes()
        for others in neighbours
        for at in (0, 7, 15)
    }
    assert len(got) == 1


def test_experts_nobody_chose_change_nothing(keys):
    """Their weights may be anything at all."""
    moe = block()
    x_BTD = jax.random.normal(next(keys), (1, 2, 32))
    _, chosen_Tk = moe.route(x_BTD[0])
    want = apply(moe, x_BTD)
    unused = sorted(set(range(8)) - set(np.asarray(chosen_Tk).ravel().tolist()))
    assert unused
    moe.down_EDI.set_value(moe.down_EDI[...].at[jnp.asarray(unused)].set(jnp.nan))
    np.testing.assert_array_equal(apply(moe, x_BTD), want)


def test_a_selection_bias_chooses_and_weighs_nothing(keys):
    """The same for all, it changes nothing; a large one for an expert makes it everyone's."""
    model = load_model(GOLDENS / "deepseek-v3")
    graph, state = nnx.split(model.layers[1].moe)
    moe = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    x_TD = jax.random.normal(next(keys), (9, 32))
    bias_R = moe.selection_bias_R.get_value()
    weight_Tk, expert_Tk = moe.route(x_TD)
    moe.selection_bias_R.set_value(bias_R + 4)
    same = moe.route(x_TD)
    np.testing.assert_array_equal(same[1], expert_Tk)
    np.testing.assert_array_equal(same[0], weight_Tk)
    moe.selection_bias_R.set_value(bias_R.at[5].add(100))
    weight_Tk, expert_Tk = (np.asarray(x) for x in moe.route(x_TD))
    assert (expert_Tk == 5).any(1).all()
    score_TR = 1 / (1 + np.exp(-np.asarray(x_TD, np.float64) @ moe.router_DR[...]))
    score_Tk = np.take_along_axis(score_TR, expert_Tk, axis=1)
    want = 2.5 * score_Tk / score_Tk.sum(1, keepdims=True)
    np.testing.assert_allclose(weight_Tk, want, rtol=1e-5)


def test_large_logits_choose_though_their_sigmoids_are_equal(keys):
    """Float32 has 1 for each of them."""
    graph, state = nnx.split(load_model(GOLDENS / "llama4").layers[1].moe)
    moe = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    x_TD = jnp.abs(jax.random.normal(next(keys), (9, 32))) + 1
    moe.router_DR.set_value(jnp.broadcast_to(jnp.asarray([1.0, 1.5, 3.0, 2.0])[None], (32, 4)))
    weight_Tk, expert_Tk = moe.route(x_TD)
    np.testing.assert_array_equal(weight_Tk, 1)
    np.testing.assert_array_equal(expert_Tk, 2)


@pytest.mark.parametrize("best, kept", [(1, [0, 1, 2, 3]), (2, [2, 3, 6, 7])])
def test_groups_are_chosen_by_their_best(best, kept):
    """The best expert of all, alone, does not make its group one of those whose two are best."""
    score_TR = jnp.asarray([[0.9, 0.0, 0.6, 0.5, 0.1, 0.2, 0.5, 0.45]])
    got_R = _of_the_best(score_TR, ExpertGroups(count=4, chosen=2, best=best))[0]
    assert np.flatnonzero(got_R > -np.inf).tolist() == kept
    np.testing.assert_array_equal(got_R[jnp.array(kept)], score_TR[0, jnp.array(kept)])


def dequantized(q: QTensor) -> np.ndarray:
    """What the QTensor of a stack stands for, [..., N, K], written out as its formats say."""
    data, scale = np.asarray(q.data_NK, np.float32), np.asarray(q.scale, np.float32)
    *_, N, K = data.shape
    match q.data_NK.dtype.name:
        case "int4":
            return data * np.repeat(scale.swapaxes(-1, -2), K // scale.shape[-2], -1)
        case "int8":
            return data * scale[..., None]
        case _:
            return data * np.repeat(np.repeat(scale, 128, -2)[..., :N, :], 128, -1)[..., :K]


@pytest.mark.parametrize("method", ["int4", "int8", "fp8"])
def test_quantized_experts_hold_the_nearest_numbers(method):
    model = load_model(GOLDENS / "qwen3-moe")
    moe = experts(model)
    matrices = lambda: [p.get_value() for p in (moe.gate_up_EID, moe.down_EDI)]
    before = matrices()
    quantize_model(model, method, CPU)
    half_step = {"int4": 0.5 / 7, "int8": 0.5 / 127, "fp8": 2**-4}[method]
    for w, q in zip(before, matrices(), strict=True):
        assert isinstance(q, QTensor) and q.data_NK.shape == w.shape
        assert np.abs(dequantized(q) - w).max() <= half_step * np.abs(w).max()
    assert moe.router_DR.get_value().dtype == jnp.float32


@pytest.mark.parametrize("method", ["int4", "int8"])
def test_quantized_experts_are_multiplied_as_they_stand(method, keys):
    """A model that holds in float32 what the quantized one stores gives its logits."""
    quantized, plain = (load_model(GOLDENS / "qwen3-moe") for _ in range(2))
    quantize_model(quantized, method, CPU)
    for name in ("gate_up_EID", "down_EDI"):
        q = getattr(quantized.layers[0].moe, name).get_value()
        getattr(plain.layers[0].moe, name).set_value(jnp.asarray(dequantized(q)))
    for name in ("q_D_NH", "k_D_KH", "v_D_KH", "o_NH_D"):
        q = getattr(quantized.layers[0].attn, name).get_value()
        w_LKN = jnp.asarray(dequantized(q)).swapaxes(1, 2)
        getattr(plain.layers[0].attn, name).set_value(w_LKN)
    tokens_BT = jax.random.randint(next(keys), (1, 20), 0, 160)
    got, want = forward(quantized, tokens_BT), forward(plain, tokens_BT)
    np.testing.assert_allclose(got, want, atol=ATOL["same"], rtol=0)


def test_fp8_experts_round_the_activations_too(keys):
    moe = block()
    x_BTD = jax.random.normal(next(keys), (1, 9, 32))
    want = apply(moe, x_BTD)
    quantize_model(moe, "fp8", CPU)
    error = np.linalg.norm(apply(moe, x_BTD) - want) / np.linalg.norm(want)
    assert 0 < error < 0.1  # three products, each rounded by at most 2**-4 and by less on average


def loop(moe: MoE, x_BTD):
    """Every expert for every token, and the weights of those not chosen are 0."""
    x_TD = x_BTD[0]
    weight_Tk, expert_Tk = moe.route(x_TD)
    y_TD = jnp.zeros_like(x_TD)
    for e, (gate_up_ID, down_DI) in enumerate(
        zip(moe.gate_up_EID[...], moe.down_EDI[...], strict=True)
    ):
        gate_TI, up_TI = jnp.split(x_TD @ gate_up_ID.T, 2, axis=1)
        weight_T1 = jnp.where(expert_Tk == e, weight_Tk, 0).sum(1, keepdims=True)
        y_TD += weight_T1 * (jax.nn.silu(gate_TI) * up_TI @ down_DI.T)
    return y_TD[None]


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_loop(devices, keys):
    x_BTD, to_BTD = jax.random.normal(next(keys), (2, 1, 9, 32))

    def gradients(of, moe):
        loss = lambda moe, x: ((of(moe, x) - to_BTD) ** 2).mean()
        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(moe, x_BTD))

    got = gradients(MoE.__call__, block(devices))
    for one, want in zip(got, gradients(loop, block()), strict=True):
        largest = np.abs(want).max()
        assert largest > 0
        np.testing.assert_allclose(one / largest, want / largest, atol=ATOL["same"], rtol=0)


def test_vmap_applies(keys):
    moe, x_NBTD = block(), jax.random.normal(next(keys), (2, 1, 9, 32))
    each = jnp.stack([apply(moe, x_BTD) for x_BTD in x_NBTD])
    got = jax.jit(jax.vmap(lambda x_BTD: moe(x_BTD)))(x_NBTD)
    np.testing.assert_allclose(got, each, atol=ATOL["same"], rtol=0)


@pytest.mark.slow
def test_the_whole_model_may_be_differentiated():
    model = load_model(GOLDENS / "qwen3-moe")
    tokens_BT = jnp.arange(12)[None]
    loss = jax.jit(lambda model: -jax.nn.log_softmax(model(tokens_BT))[..., 1].mean())
    grads = jax.jit(jax.grad(loss))(model)
    assert all(0 < jnp.abs(g).max() < 100 for g in jax.tree.leaves(grads))
    # The slope along one layer's experts, measured.
    down = experts(model).down_EDI
    held, step = down.get_value(), 1e-3

    def at(shift):
        down.set_value(held.at[1].add(shift))
        return loss(model)

    measured = (at(step) - at(-step)) / (2 * step)
    slope = grads.layers[0].moe.down_EDI.get_value()[1].sum()
    np.testing.assert_allclose(measured, slope, rtol=2e-2)
