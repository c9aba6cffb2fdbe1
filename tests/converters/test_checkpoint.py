"""generation_config.json, and the fit of tensors to what config.json says."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from converters import CheckpointError, cut_out, open_checkpoint, parameter_rules, read_tensor
from converters.families import FAMILIES
from converters.rules import Row, expand
from tests.checkpoints import GOLDENS, config, float_steps, opened, tensors, write
from xlinfer.config import GenerationConfig


def test_reading_a_config_imports_no_jax():
    code = (
        "import sys, converters; converters.open_checkpoint(sys.argv[1]).schedule();"
        "print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(GOLDENS / "llama")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


def test_generation_config(tmp_path):
    asked = {
        "eos_token_id": [5, 2],
        "bos_token_id": 1,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
        "max_new_tokens": 77,
        "pad_token_id": 0,
    }
    cfg = config(eos_token_id=9)
    want = GenerationConfig(
        eos_token_ids=(5, 2, 9),
        bos_token_id=1,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.1,
        repetition_penalty=1.05,
        max_new_tokens=77,
    )
    assert opened(tmp_path, cfg, generation_config=asked).generation == want
    assert opened(tmp_path, cfg, generation_config={**asked, "do_sample": True}).generation == want
    greedy = opened(tmp_path, cfg, generation_config={**asked, "do_sample": False}).generation
    assert greedy == GenerationConfig(
        eos_token_ids=(5, 2, 9), bos_token_id=1, repetition_penalty=1.05, max_new_tokens=77
    )


@pytest.mark.parametrize(
    "cfg, asked, stops",
    [
        (config(eos_token_id=2), {}, (2,)),
        (config(eos_token_id=[2, 3]), {"eos_token_id": 2}, (2, 3)),
        (config(eos_token_id=None), {"eos_token_id": [4]}, (4,)),
        (config(eos_token_id=...), {}, ()),
    ],
)
def test_stop_ids_are_those_of_both_files(cfg, asked, stops, tmp_path):
    assert opened(tmp_path, cfg, generation_config=asked).generation.eos_token_ids == stops


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"temperature": -1}, "'temperature' is -1"),
        ({"temperature": "hot"}, "'temperature' is 'hot'"),
        ({"top_p": 1.5}, "from 0 to 1"),
        ({"top_k": 2.5}, "'top_k' is 2.5"),
        ({"max_new_tokens": 0}, "'max_new_tokens'"),
        ({"eos_token_id": [-1]}, "'eos_token_id'"),
    ],
)
def test_generation_configs_that_are_refused(asked, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, config(), generation_config=asked)
    assert "generation_config.json" in str(caught.value)


def test_paths_that_are_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for path, message in {
        "meta-llama/Llama-3.2-1B": "hf download meta-llama/Llama-3.2-1B",
        "/no/such/folder": "there is no folder '/no/such/folder'",
        str(file): "is a file",
        str(tmp_path): "has no config.json",
        "x" * 5000: "there is no folder",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_config_json_that_is_no_json(tmp_path):
    for text, message in {"{": "cannot be read", '{"a":1,"a":2}': "names a twice"}.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)


def some_checkpoint(model_type):
    """A golden's config.json and tensors; of a family without one, made here."""
    for file in GOLDENS.glob("*/config.json"):
        if (cfg := json.loads(file.read_text()))["model_type"] == model_type:
            return cfg, load_file(file.parent / "model.safetensors")
    cfg = config(model_type)
    return cfg, tensors(cfg)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_has_one_place(model_type, shards, tmp_path):
    cfg, held = some_checkpoint(model_type)
    checkpoint = open_checkpoint(write(tmp_path, cfg, held, shards))
    steps = float_steps(checkpoint)
    assert {step.tensor.name for step in steps} == held.keys()
    pieces = sum(step.nbytes for step in steps)
    # The first rows of positions.
    unused = {"opt": 2 * 4 * cfg.get("hidden_size", 0), "bart": 2 * 2 * 4 * cfg.get("d_model", 0)}
    assert pieces + unused.get(model_type, 0) == sum(array.nbytes for array in held.values()), (
        "each number once"
    )
    places = [(step.tensor.file, step.tensor.offset) for step in steps]
    assert places == sorted(places)
    targets = {(step.rule.target, step.start) for step in steps}
    assert len(targets) == len(steps)
    for step in steps:
        np.testing.assert_array_equal(read_tensor(step.tensor), held[step.tensor.name])


def test_the_rule_of_a_kv_projection(tmp_path):
    cfg = opened(tmp_path, config()).config
    rules = {rule.target: rule for rule in parameter_rules(cfg, kv_replicas=2)}
    rule = rules["layers", 0, "attn", "k_D_KH"]
    assert rule.shape == (2, 16, 32) and rule.source_shape == (16, 16)
    assert rule.sources == tuple(f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2))
    assert rules["layers", 0, "attn", "q_D_NH"].shape == (2, 16, 32)


def test_the_rule_of_experts(tmp_path):
    """Gate and up of one expert lie one after the other along one axis."""
    rules = {
        rule.target: rule for rule in parameter_rules(opened(tmp_path, config("mixtral")).config)
    }
    rule = rules["layers", 0, "moe", "gate_up_EID"]
    assert rule.shape == (2, 4, 48, 16) and rule.source_shape == (24, 16)
    assert rule.layout.slot == (1, 1, 24, 16)
    place = dict(zip(rule.sources, rule.starts, strict=True))
    assert len(place) == 2 * 4 * 2
    experts = "model.layers.1.block_sparse_moe.experts"
    assert place[f"{experts}.2.w1.weight"] == (1, 2, 0, 0)
    assert place[f"{experts}.2.w3.weight"] == (1, 2, 24, 0)


def drop(held):
    del held["model.layers.0.mlp.up_proj.weight"]


def turn(held):
    name = "model.layers.0.self_attn.k_proj.weight"
    held[name] = np.ascontiguousarray(np.zeros((8, 32), np.float32))


def add(held):
    held["model.layers.0.mlp.gate_proj.bias"] = np.zeros(24, np.float32)


def integers(held):
    held["model.norm.weight"] = np.ones(16, np.int8)


def one_layer(held):
    for name in list(held):
        if ".layers.1." in name:
            del held[name]


@pytest.mark.parametrize(
    "change, message",
    [
        (drop, "missing: model.layers.0.mlp.up_proj.weight"),
        (turn, r"k_proj.weight has shape \[8, 32\] where the config asks for \[16, 16\]"),
        (add, "left over.*: model.layers.0.mlp.gate_proj.bias"),
        (integers, "'model.norm.weight' is int8"),
        (one_layer, r"missing: model.layers.1.*model.layers.1"),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    held = tensors(config())
    change(held)
    checkpoint = open_checkpoint(write(tmp_path, config(), held))
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.schedule()
    assert str(tmp_path) in str(caught.value)


def test_an_error_names_ten_tensors_and_counts_the_rest(tmp_path):
    held = tensors(config())
    few = {name: held[name] for name in list(held)[:3]}
    with pytest.raises(CheckpointError, match=f"and {len(held) - 3 - 10} more"):
        open_checkpoint(write(tmp_path, config(), few)).schedule()


def test_a_piece_of_a_tensor():
    """The heads of q, k and v one after the other, or by turns within each head."""
    cfg = open_checkpoint(GOLDENS / "phi3").config
    rules = {rule.target: rule for rule in parameter_rules(cfg)}
    fused = np.arange(64 * 32).reshape(64, 32)
    for name, piece in (("q_D_NH", fused[:32]), ("k_D_KH", fused[32:48]), ("v_D_KH", fused[48:])):
        rule = rules["layers", 0, "attn", name]
        assert rule.source_shape == fused.shape
        np.testing.assert_array_equal(cut_out(fused, rule), piece)
    by_turns = expand([Row("k", "qkv", "(K H|H|H) D -> D (K H)", piece=1)], cfg)[0]
    fused = np.arange(2 * 3 * 8 * 32).reshape(2, 3, 8, 32)
    got = cut_out(fused.reshape(-1, 32), by_turns)
    np.testing.assert_array_equal(got, fused[:, 1].reshape(16, 32))


def test_a_piece_of_each_group_of_heads():
    """Two query heads, their k and their v, then the next two; only kv heads are repeated."""
    cfg = open_checkpoint(GOLDENS / "phi3").config
    fused = np.arange(2 * 4 * 8 * 32).reshape(2, 4, 8, 32)
    sources = {
        "q": ("(X G|1|1 H)", "(N H)", fused[:, :2], (32, 32), (4, 8)),
        "k": ("(K G|1|1 H)", "(K H)", fused[:, 2], (32, 32), (4, 8)),
        "v": ("(K G|1|1 H)", "(K H)", fused[:, 3], (32, 32), (4, 8)),
    }
    for piece, (axes, to, want, shape, bias_shape) in enumerate(sources.values()):
        rows = [
            Row("weight", "w", f"{axes} D -> D {to}", piece=piece),
            Row("bias", "b", f"{axes} -> {to.strip('()')}", piece=piece),
        ]
        weight, bias = expand(rows, cfg, kv_replicas=2)
        assert (weight.source_shape, bias.source_shape) == ((64, 32), (64,))
        assert (weight.shape, bias.shape) == (shape, bias_shape)
        got = cut_out(fused.reshape(64, 32), weight)
        np.testing.assert_array_equal(got, want.reshape(-1, 32))
        got = cut_out(fused[..., 0].reshape(64), bias)
        np.testing.assert_array_equal(got, want[..., 0].reshape(-1))


def test_names_without_their_prefix(tmp_path):
    """As GPT-2 itself was published, its causal masks included."""
    cfg = json.loads((GOLDENS / "gpt2" / "config.json").read_text())
    held = load_file(GOLDENS / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): array for name, array in held.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    steps = float_steps(open_checkpoint(write(tmp_path, cfg, bare)))
    assert {step.tensor.name for step in steps} == bare.keys() - {"h.0.attn.bias"}


def test_leftovers_of_old_files_are_ignored(tmp_path):
    held = tensors(config())
    held["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert open_checkpoint(write(tmp_path, config(), held)).schedule()


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    cfg = config(tie_word_embeddings=True)
    held = tensors(cfg)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()
    assert open_checkpoint(write(tmp_path, cfg, held)).schedule()
    held["lm_head.weight"][-1, -1] = np.nextafter(held["lm_head.weight"][-1, -1], np.inf)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is there and differs"):
        open_checkpoint(write(tmp_path, cfg, held)).schedule()


def test_a_truncated_checkpoint_names_the_tensor(tmp_path):
    shutil.copytree(GOLDENS / "llama", tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*tensor 'model"):
        open_checkpoint(tmp_path / "cut").schedule()


def test_layers_that_predict_more_tokens_are_ignored(tmp_path):
    """DeepSeek V3's one after the last; no other, and of no other family."""
    golden = GOLDENS / "deepseek-v3"
    cfg = json.loads((golden / "config.json").read_text())
    held = load_file(golden / "model.safetensors")
    more = held | {
        name.replace("layers.2.", "layers.3."): array
        for name, array in held.items()
        if ".layers.2." in name
    }
    more["model.layers.3.eh_proj.weight"] = np.zeros((32, 64), np.float32)
    steps = float_steps(open_checkpoint(write(tmp_path / "more", cfg, more)))
    assert {step.tensor.name for step in steps} == held.keys()
    more["model.layers.4.eh_proj.weight"] = more["model.layers.3.eh_proj.weight"]
    with pytest.raises(CheckpointError, match=r"left over.*: model.layers.4.eh_proj.weight$"):
        open_checkpoint(write(tmp_path / "too_many", cfg, more)).schedule()
    held = load_file(GOLDENS / "deepseek-v2" / "model.safetensors")
    held["model.layers.3.eh_proj.weight"] = np.zeros((32, 64), np.float32)
    cfg = json.loads((GOLDENS / "deepseek-v2" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"left over.*: model.layers.3.eh_proj.weight$"):
        open_checkpoint(write(tmp_path / "v2", cfg, held)).schedule()
