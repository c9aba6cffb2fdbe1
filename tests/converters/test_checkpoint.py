"""config.json, generation_config.json and the fit of tensors to them."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from converters import CheckpointError, open_checkpoint, parameter_rules, read_tensor
from converters.families import FAMILIES
from tests.checkpoints import GOLDENS, config, tensors, write
from xlinfer.config import DefaultRope, GenerationConfig, LinearRope, MoE


def opened(tmp_path, cfg, **files):
    for name, content in {"config": cfg, **files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return open_checkpoint(tmp_path)


def test_reading_a_config_imports_no_jax():
    code = (
        "import sys, converters; converters.open_checkpoint(sys.argv[1]).schedule();"
        "print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(GOLDENS / "llama")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


def test_constants_of_each_family(tmp_path):
    llama = opened(tmp_path, config()).config
    assert (llama.hidden_size, llama.num_layers, llama.num_heads) == (16, 2, 4)
    assert (llama.num_kv_heads, llama.head_dim, llama.norm_eps) == (2, 8, 1e-5)
    assert llama.rope == DefaultRope(theta=1000.0) and llama.windows == (None, None)
    qwen2 = opened(tmp_path, config("qwen2")).config
    assert qwen2.qkv_bias and not qwen2.attention_output_bias and not qwen2.qk_norm
    qwen3 = opened(tmp_path, config("qwen3")).config
    assert qwen3.qk_norm and not qwen3.qkv_bias
    biased = opened(tmp_path, config("qwen3", attention_bias=True)).config
    assert biased.qkv_bias and biased.attention_output_bias


@pytest.mark.parametrize(
    "cfg, field, want",
    [
        # What each class of transformers puts for a key that is absent.
        (config(rope_parameters=...), "rope", DefaultRope(theta=10_000.0)),
        (config(rms_norm_eps=...), "norm_eps", 1e-6),
        (config(num_key_value_heads=...), "num_kv_heads", 4),
        (config(num_key_value_heads=None), "num_kv_heads", 4),
        (config(head_dim=...), "head_dim", 4),
        (config(head_dim=None), "head_dim", 4),
        (config(tie_word_embeddings=...), "tie_word_embeddings", False),
        (config("qwen2", tie_word_embeddings=...), "tie_word_embeddings", False),
        (config("qwen3", head_dim=...), "head_dim", 128),
        (config("mistral"), "windows", (4096, 4096)),
        (config("mixtral"), "windows", (None, None)),
        (config("mixtral", rope_parameters=...), "rope", DefaultRope(theta=1_000_000.0)),
        (config("mixtral", router_jitter_noise=0.1), "num_kv_heads", 2),
        (config("qwen3_moe", head_dim=None), "head_dim", 4),
        (config("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=1), "num_kv_heads", 2),
        (config("qwen2_moe"), "qkv_bias", True),
        (config("qwen2_moe", qkv_bias=False), "qkv_bias", False),
        (config("mistral", sliding_window=None), "windows", (None, None)),
        (config("mistral", sliding_window=7), "windows", (7, 7)),
        (config("qwen2", sliding_window=7), "windows", (None, None)),
        (
            config("qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=1),
            "windows",
            (None, 7),
        ),
        (
            config(
                "qwen3",
                sliding_window=7,
                use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "windows",
            (7, None),
        ),
        (config(hidden_act="gelu_pytorch_tanh"), "hidden_act", "gelu_tanh"),
        (
            config(
                rope_parameters=..., rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}
            ),
            "rope",
            LinearRope(theta=5e5, factor=2.0),
        ),
        # Kept from fine-tuning and export tools, without a meaning for inference.
        (
            config(auto_map={"AutoModel": "x--y.Z"}, unsloth_version="1", use_cache=True),
            "rope",
            ...,
        ),
    ],
)
def test_absent_and_optional_keys(cfg, field, want, tmp_path):
    got = getattr(opened(tmp_path, cfg).config, field)
    assert want is ... or got == want


@pytest.mark.parametrize(
    "cfg, message",
    [
        (config(foo=1), "unknown model constant 'foo'"),
        (config(foo=1, bar=2), "'bar', 'foo'"),
        (config(logits_scaling=8.0), "'logits_scaling'"),
        (config(sliding_window=4), "'sliding_window'"),  # a key of other families
        (config(vocab_size=...), "'vocab_size' is missing"),
        (config(vocab_size="64"), "'vocab_size' is '64'"),
        (config(vocab_size=True), "'vocab_size' is True"),
        (config(num_hidden_layers=0), "'num_hidden_layers' is 0; it must be an integer >= 1"),
        (config(hidden_size=16.5), "'hidden_size' is 16.5"),
        (config(hidden_size=None), "'hidden_size' is None"),
        (config(rms_norm_eps=-1e-6), "'rms_norm_eps'"),
        (config(rms_norm_eps=float("nan")), "'rms_norm_eps'"),
        (config(tie_word_embeddings="false"), "'tie_word_embeddings' is 'false'"),
        (config(attention_bias=1), "'attention_bias' is 1"),
        (config(num_attention_heads=3, num_key_value_heads=2), "3 is not a multiple"),
        (config(num_attention_heads=3, num_key_value_heads=3, head_dim=None), "no head_dim"),
        (config(head_dim=7), "odd"),
        (config(hidden_act="relu"), "'relu'.* silu"),
        (config(rope_interleaved=True), "'rope_interleaved' is True"),
        (config(is_encoder_decoder=True), "'is_encoder_decoder' is True"),
        (config(partial_rotary_factor=0.5), "'partial_rotary_factor' is 0.5"),
        (config("mistral", attention_bias=True), "'attention_bias' is True"),
        (config("qwen2", use_mrope=True), "'use_mrope' is True"),
        (config("qwen2", layer_types=["full_attention"]), "must hold 2"),
        (config("qwen2", layer_types=["full_attention", "linear_attention"]), "linear_attention"),
        (config("qwen2", layer_types=["sliding_attention"] * 2), "use_sliding_window is false"),
        (config("qwen2", layer_types="full_attention"), "'layer_types'"),
        (config("qwen2", layer_types=[1, 2]), "'layer_types'"),
        (config(quantization_config={"quant_method": "awq"}), "awq.* no quantized format yet"),
        (config("lama"), "does not know model_type 'lama'. The nearest: llama"),
        (
            config("qwen2_vl"),
            "The nearest: qwen2.* It knows llama, mistral, mixtral, qwen2, qwen2_",
        ),
        (config("qwen3_moe", num_experts=...), "'num_experts' is missing"),
        (config("qwen3_moe", num_local_experts=4), "num_experts is 8 and num_local_experts 4"),
        (config("qwen3_moe", num_experts_per_tok=9), "'num_experts_per_tok' is 9, .* 8 experts"),
        (config("qwen3_moe", moe_intermediate_size=...), "'moe_intermediate_size' is missing"),
        (config("qwen3_moe", mlp_only_layers=[1]), r"mlp_only_layers \[1\].* leave layers 1 with"),
        (config("qwen3_moe", mlp_only_layers=["1"]), "'mlp_only_layers' is"),
        (config("qwen2_moe", decoder_sparse_step=2), "decoder_sparse_step 2 leave layers 0 with"),
        (config("qwen2_moe", use_sliding_window=True), "'use_sliding_window' is True"),
        (config("qwen3_moe", shared_expert_intermediate_size=8), "unknown model constant"),
        (config("qwen2_moe", shared_expert_intermediate_size=...), "'shared_expert_int.* missing"),
        (config("mixtral", norm_topk_prob=False), "unknown model constant 'norm_topk_prob'"),
        (config("mixtral", attention_bias=True), "'attention_bias' is True"),
        (config("zzz"), "'zzz'. It knows llama"),
        (config(model_type=...), "'model_type' must name"),
        (config(eos_token_id="x"), "'eos_token_id' is 'x'"),
        ([], "must be an object"),
    ],
)
def test_configs_that_are_refused(cfg, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, cfg)
    assert str(tmp_path / "config.json") in str(caught.value)


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
    file = tmp_path / "model.gguf"
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


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_has_one_place(model_type, shards, tmp_path):
    cfg = config(model_type, tie_word_embeddings=model_type == "qwen2")
    held = tensors(cfg)
    checkpoint = open_checkpoint(write(tmp_path, cfg, held, shards))
    steps = checkpoint.schedule()
    assert sorted(step.tensor.name for step in steps) == sorted(held)
    places = [(step.tensor.file, step.tensor.offset) for step in steps]
    assert places == sorted(places)
    targets = {(step.rule.target, step.start) for step in steps}
    assert len(targets) == len(steps)
    for step in steps:
        np.testing.assert_array_equal(read_tensor(step.tensor), held[step.tensor.name])


def test_the_rule_of_a_kv_projection(tmp_path):
    cfg = opened(tmp_path, config()).config
    rules = {rule.target: rule for rule in parameter_rules(cfg, kv_replicas=2)}
    rule = rules["layers", "attn", "k_D_KH"]
    assert rule.shape == (2, 16, 32) and rule.source_shape == (16, 16)
    assert rule.sources == tuple(f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2))
    assert rules["layers", "attn", "q_D_NH"].shape == (2, 16, 32)


def test_the_constants_of_experts(tmp_path):
    """By either name for their number; Qwen's weights add up to 1 only where the file says so."""
    shared = MoE(
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=12,
        norm_topk_prob=False,
        shared_intermediate_size=20,
    )
    assert opened(tmp_path, config("qwen2_moe")).config.moe == shared
    renamed = config("qwen2_moe", num_experts=..., num_local_experts=4, norm_topk_prob=True)
    assert opened(tmp_path, renamed).config.moe == replace(shared, norm_topk_prob=True)
    mixtral = replace(
        shared, intermediate_size=24, norm_topk_prob=True, shared_intermediate_size=None
    )
    assert opened(tmp_path, config("mixtral")).config.moe == mixtral
    assert opened(tmp_path, config("qwen3")).config.moe is None


def test_the_rule_of_experts(tmp_path):
    """Gate and up of one expert lie one after the other along one axis."""
    rules = {
        rule.target: rule for rule in parameter_rules(opened(tmp_path, config("mixtral")).config)
    }
    rule = rules["layers", "mlp", "gate_up_EID"]
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
