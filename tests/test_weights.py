"""Every weight arrives with its value, dtype and place, by any road."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from converters import CheckpointError, open_checkpoint, parameter_rules
from tests.checkpoints import GOLDENS, config, tensors, write
from xlinfer.mesh import make_mesh
from xlinfer.models import Transformer
from xlinfer.models.moe import MoE
from xlinfer.placing import AXES
from xlinfer.weights import load_model, stored_dtype

SOURCES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


def parameters(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(param.get_value()) for path, param in flat}


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A checkpoint with every kind of parameter that Llama has."""
    cfg = config(attention_bias=True, mlp_bias=True)
    held = tensors(cfg)
    return write(tmp_path_factory.mktemp("biased"), cfg, held), held


@pytest.mark.parametrize("source", SOURCES)
def test_values_survive_their_dtype(source, tmp_path):
    cfg = config()
    held = tensors(cfg, SOURCES[source])
    got = parameters(load_model(write(tmp_path, cfg, held)))
    want = {name: array.astype(np.float32) for name, array in held.items()}
    assert all(array.dtype == np.float32 for array in got.values())  # auto, on CPU
    np.testing.assert_array_equal(got["embed_VD"], want["model.embed_tokens.weight"])
    np.testing.assert_array_equal(got["head_DV"], want["lm_head.weight"].T)
    np.testing.assert_array_equal(got["norm.scale_D"], want["model.norm.weight"])
    for i in range(2):
        at = f"model.layers.{i}"
        q = want[f"{at}.self_attn.q_proj.weight"].T
        o = want[f"{at}.self_attn.o_proj.weight"].T
        np.testing.assert_array_equal(got["layers.0.attn.q_D_NH"][i], q)
        np.testing.assert_array_equal(got["layers.0.attn.o_NH_D"][i], o)
        down = want[f"{at}.mlp.down_proj.weight"].T
        np.testing.assert_array_equal(got["layers.0.mlp.down_FD"][i], down)


@pytest.mark.parametrize("source", SOURCES)
def test_stored_dtype(source, tmp_path):
    cfg = config()
    held = tensors(cfg, SOURCES[source])
    held["model.norm.weight"] = held["model.norm.weight"].astype(np.float32)  # mixed, as many are
    got = stored_dtype(open_checkpoint(write(tmp_path, cfg, held)))
    assert got == (np.float32 if source == "F64" else SOURCES[source])


@pytest.mark.parametrize(
    "asked, want",
    [
        ("auto", jnp.float32),
        (None, jnp.float32),
        ("bfloat16", jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16),
        ("half", jnp.float16),
        (np.dtype("float32"), jnp.float32),
    ],
)
def test_dtype_asked_for(asked, want, biased):
    folder, held = biased
    got = parameters(load_model(folder, dtype=asked))
    assert all(array.dtype == want for array in got.values())
    np.testing.assert_array_equal(
        got["embed_VD"], held["model.embed_tokens.weight"].astype(jnp.dtype(want))
    )


def test_a_selection_bias_stays_float32():
    golden = GOLDENS / "deepseek-v3"
    got = parameters(load_model(golden, dtype="bfloat16"))
    others = {array.dtype for name, array in got.items() if "selection_bias" not in name}
    assert others == {np.dtype(jnp.bfloat16)}
    held = load_file(golden / "model.safetensors")
    want = [held[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] for i in (1, 2)]
    np.testing.assert_array_equal(got["layers.1.moe.selection_bias_R"], want)


@pytest.mark.parametrize("asked", ["int8", "float64", "fp32", int, object(), "", 16])
def test_dtypes_that_are_refused(asked, biased):
    with pytest.raises(ValueError, match="not one of auto, float32"):
        load_model(biased[0], dtype=asked)


@pytest.mark.parametrize("devices", [2, 4])
def test_a_sharded_model_holds_the_same_numbers(devices, biased):
    """On four devices each of the two kv heads stands twice, side by side."""
    whole = parameters(load_model(biased[0]))
    model = load_model(biased[0], mesh=make_mesh(devices))
    for name, got in parameters(model).items():
        want = whole[name]
        if got.shape != want.shape:
            assert devices == 4 and name.split(".")[-1][0] in "kv"
            size = model.head_dim
            lead = want.shape[:-2] if want.shape[-1] == size else want.shape[:-1]
            want = np.repeat(want.reshape(*lead, 2, size), 2, axis=-2).reshape(got.shape)
        np.testing.assert_array_equal(got, want, err_msg=name)
    assert model.cfg.num_kv_heads == model.num_kv_heads == max(2, devices)


def test_each_device_holds_its_share(biased):
    model = load_model(biased[0], mesh=make_mesh(4))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        array, axes = param.get_value(), param.get_metadata("logical_axes")
        shared = 4 if {"heads", "kv_heads", "ffw", "vocab"} & set(axes) else 1
        sizes = {shard.data.size for shard in array.addressable_shards}
        assert len(array.sharding.device_set) == 4
        assert sizes == {array.size // shared}, path


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_every_expert_lands_in_its_place(family, devices, tmp_path):
    """[layer, expert], the gate's rows before up's; each device holds its own experts alone."""
    cfg = config(family)
    held = tensors(cfg)
    model = load_model(write(tmp_path, cfg, held, shards=3), mesh=make_mesh(devices))
    got = parameters(model)
    for name, array in held.items():
        if ".experts." not in name:
            continue
        _, _, layer, _, _, expert, matrix, _ = name.split(".")
        at, size = (int(layer), int(expert)), 24 if family == "mixtral" else 12
        want = {
            "gate": got["layers.0.moe.gate_up_EID"][at][:size],
            "up": got["layers.0.moe.gate_up_EID"][at][size:],
            "down": got["layers.0.moe.down_EDI"][at],
        }
        part = {"w1": "gate", "w3": "up", "w2": "down"}.get(matrix) or matrix.split("_")[0]
        np.testing.assert_array_equal(array, want[part], err_msg=name)
    mlp = model.layers[0].moe
    assert isinstance(mlp, MoE)
    stack = mlp.down_EDI.get_value()
    assert {s.data.shape[1] for s in stack.addressable_shards} == {4 // devices}
    assert mlp.router_DR.get_value().sharding.is_fully_replicated


def test_a_vocabulary_that_does_not_divide_stands_whole(tmp_path):
    cfg = config(vocab_size=63)
    folder = write(tmp_path, cfg, tensors(cfg))
    model = load_model(folder, mesh=make_mesh(2))
    assert model.embed_VD.get_value().sharding.is_fully_replicated
    assert not model.layers[0].attn.q_D_NH.get_value().sharding.is_fully_replicated
    np.testing.assert_array_equal(
        parameters(model)["head_DV"], parameters(load_model(folder))["head_DV"]
    )


@pytest.mark.parametrize(
    "values",
    [config(attention_bias=True, mlp_bias=True), config("qwen2_moe"), config("mixtral")],
    ids=lambda values: values["model_type"],
)
def test_the_table_names_the_axes_as_the_modules_do(values, tmp_path):
    cfg = open_checkpoint(write(tmp_path, values, tensors(values))).config
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    axes = {path: p.get_metadata("logical_axes") for path, p in nnx.to_flat_state(nnx.state(model))}
    # Gates and ups of experts are split one by one: their order, P, is not.
    first = lambda group: AXES[group[-1] if group[0] == "P" else group[0]]
    rules = {rule.target: tuple(map(first, rule.axes)) for rule in parameter_rules(cfg)}
    assert rules == axes


@pytest.mark.parametrize("in_flight", [1, 5000, 1 << 30])
def test_shards_progress_and_the_budget(in_flight, biased, tmp_path):
    """Any budget and any number of files give the same model, and progress counts every byte."""
    folder, held = biased
    cfg = config(attention_bias=True, mlp_bias=True)
    seen = []
    split = load_model(
        write(tmp_path, cfg, held, shards=3),
        progress=lambda *at: seen.append(at),
        in_flight_bytes=in_flight,
    )
    for name, want in parameters(load_model(folder)).items():
        np.testing.assert_array_equal(parameters(split)[name], want)
    total = sum(array.nbytes for array in held.values())
    assert seen[0] == ("load", 0, total) and seen[-1] == ("load", total, total)
    assert len(seen) == len(held) + 1
    assert all(a[1] < b[1] for a, b in pairwise(seen))


def test_depth_costs_no_compiles(tmp_path):
    """One program for all zeros, one for each layout: however many layers there are."""
    compiles = []

    def count(event: str, duration_secs: float, **kwargs) -> None:
        if event.endswith("backend_compile_duration"):
            compiles.append(kwargs)

    for depth in (1, 7):
        cfg = config(num_hidden_layers=depth, vocab_size=70 + depth)
        folder = write(tmp_path / str(depth), cfg, tensors(cfg))
        jax.clear_caches()
        jax.monitoring.register_event_duration_secs_listener(count)
        load_model(folder)
        jax.monitoring.unregister_event_duration_listener(count)
        assert 5 < len(compiles) <= 12
        compiles.clear()


def test_loading_reads_the_file_and_does_not_hold_it(tmp_path):
    """A parameter is no view of the file: overwriting it later changes nothing."""
    cfg = config()
    folder = write(tmp_path, cfg, tensors(cfg))
    model = load_model(folder)
    before = parameters(model)["embed_VD"].copy()
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    np.testing.assert_array_equal(parameters(model)["embed_VD"], before)


def test_devices_that_do_not_divide_the_model(biased):
    with pytest.raises(ValueError, match="tensor_parallel_size 3 does not fit"):
        load_model(biased[0], mesh=make_mesh(3))


def test_a_bad_checkpoint_is_refused_before_anything_is_placed(tmp_path):
    held = tensors(config())
    held["extra.weight"] = np.ones(1, np.float32)
    with pytest.raises(CheckpointError, match=r"left over.*extra\.weight"):
        load_model(write(tmp_path, config(), held))


def test_greedy_continuation_equals_transformers():
    """The plain forward, one token at a time."""
    want = load_file(GOLDENS / "llama" / "golden.safetensors")
    model = load_model(GOLDENS / "llama")
    forward = jax.jit(lambda m, t: m(t).argmax(-1))
    tokens = np.zeros((2, 44), np.int32)  # causal: what follows does not reach back
    tokens[:, :32] = want["input_ids"]
    for at in range(32, 44):
        tokens[:, at] = np.asarray(forward(model, tokens))[:, at - 1]
    np.testing.assert_array_equal(tokens[:, 32:], want["greedy"])
