"""python -m converters.inspect says what headers say, also of what cannot be loaded."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from converters.inspect import main
from converters.report import ranges, report
from tests.checkpoints import (
    ENCODER_DECODERS,
    FAMILIES,
    GOLDENS,
    QUANTIZED_GOLDENS,
    config,
    tensors,
    write,
)

MALFORMED = GOLDENS.parent / "malformed"

NEVER_READ = {"opt": 2 * 32, "bart": 2 * 2 * 32}  # the first two positions of a table


def run(*arguments):
    return main(["inspect", *map(str, arguments)])


def rows(made):
    return {row["name"]: row for group in made["groups"] for row in group["tensors"]}


@pytest.mark.parametrize("name", FAMILIES + ENCODER_DECODERS)
def test_every_tensor_is_counted_once_and_has_a_role(name):
    made = report(GOLDENS / name)
    assert made["refused"] is None and made["ignored"] == []
    with safe_open(GOLDENS / name / "model.safetensors", "numpy") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]
    numbers = sum(map(math.prod, shapes))
    assert made["totals"] == {
        "float32": {"tensors": len(shapes), "numbers": numbers, "bytes": 4 * numbers}
    }
    assert made["parameters"] == numbers - NEVER_READ.get(name, 0)
    assert sum(group["bytes"] for group in made["groups"]) == made["bytes"] == 4 * numbers
    assert all(row["roles"] and row["form"] is None for row in rows(made).values())


def test_layers_that_are_alike_are_said_once():
    made = report(GOLDENS / "qwen2-moe")
    assert [group["layers"] for group in made["groups"]] == [None, "0-2, 4", "3, 5"]
    assert made["config"]["moe"]["layers"] == "3, 5"
    gate = rows(made)["mlp.experts.*.gate_proj.weight"]
    assert gate == {
        "name": "mlp.experts.*.gate_proj.weight", "count": 4, "roles": ["moe.gate_up_EID"],
        "dtype": "float32", "form": None, "shape": [16, 32], "bytes": 4 * 4 * 16 * 32,
    }  # fmt: skip
    fused = rows(report(GOLDENS / "phi3"))["self_attn.qkv_proj.weight"]
    assert fused["roles"] == ["attn.q_D_NH", "attn.k_D_KH", "attn.v_D_KH"]


def test_windows_and_ropes_are_said_by_layer():
    made = report(GOLDENS / "gemma3")
    assert made["config"]["windows"] == [
        {"layers": "0-4", "value": 8}, {"layers": "5", "value": None}
    ]  # fmt: skip
    assert [part["value"]["theta"] for part in made["config"]["ropes"]] == [1e4, 1e6]
    assert made["head"] == "the embedding"


@pytest.mark.parametrize(
    "name, tensor, dtype, form",
    [
        ("awq-gemm-g32-qwen2", "mlp.up_proj.qweight", "int32",
         "uint4 by groups of 32, zero points"),
        ("ct-fp8-dynamic", "mlp.up_proj.weight", "float8_e4m3fn",
         "float8_e4m3fn by channel, fp8 activations"),
        ("gptq-v1-sym-g32", "mlp.up_proj.qweight", "int32", "int4 by groups of 32"),
        ("mxfp4-gpt-oss", "mlp.experts.down_proj_blocks", "uint8", "e2m1 by groups of 32"),
    ],
)  # fmt: skip
def test_quantized_ones_have_their_forms(name, tensor, dtype, form):
    made = report(QUANTIZED_GOLDENS / name)
    assert made["refused"] is None
    row = rows(made)[tensor]
    assert row["dtype"] == dtype and row["form"].startswith(form)
    assert made["bytes"] == sum(total["bytes"] for total in made["totals"].values())


def test_shards_are_named():
    made = report(QUANTIZED_GOLDENS / "ct-fp8-dynamic")
    assert len(made["files"]) == 3
    assert made["groups"][0]["files"] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 3)]


def test_a_gguf_has_its_blocks():
    made = report(GOLDENS / "gguf-q4_k_m")
    assert made["refused"] is None and made["scheme"] == "gguf"
    assert [group["layers"] for group in made["groups"]] == [None, "0", "1"]
    head = rows(made)["lm_head.weight"]
    assert (head["dtype"], head["form"]) == ("Q6_K", "int8 by groups of 16")
    assert set(made["totals"]) == {"Q4_K", "Q6_K", "float32"}


def test_what_is_not_read_is_named_with_the_reason(tmp_path):
    cfg = config(tie_word_embeddings=True)
    held = tensors(cfg)
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1  # only data would tell
    for layer in range(2):
        held[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    made = report(write(tmp_path, cfg, held))
    assert made["refused"] is None and made["head"].endswith("a copy of it is stored")
    whys = {row["name"]: (row["count"], row["why"]) for row in made["ignored"]}
    assert whys["lm_head.weight"] == (1, "a copy of model.embed_tokens.weight")
    assert whys["model.layers.*.self_attn.rotary_emb.inv_freq"][0] == 2
    text = report(GOLDENS / "gemma3-images", text_only=True)
    assert text["refused"] is None
    assert {row["name"] for row in text["ignored"]} == {"multi_modal_projector*", "vision_tower*"}


def test_scales_of_the_kv_cache_are_named(tmp_path):
    cfg = config()
    held = tensors(cfg) | {
        f"model.layers.{layer}.self_attn.{of}_scale": np.ones(1, np.float32)
        for layer in range(cfg["num_hidden_layers"])
        for of in "kv"
    }
    made = report(write(tmp_path, cfg, held))
    count = cfg["num_hidden_layers"]
    assert made["kv_scales"] == {f"model.layers.*.self_attn.{of}_scale": count for of in "kv"}


def test_what_cannot_be_loaded_is_shown_with_exit_code_1(tmp_path, capsys):
    assert run(MALFORMED / "missing") == 1
    out, err = capsys.readouterr()
    assert "mlp.down_proj.weight" in out and "ffw 64" in out
    assert err.startswith("converters.inspect: ") and err.count("\n") == 1
    assert "missing: model.layers.0.mlp.up_proj.weight" in err
    shutil.copytree(GOLDENS / "llama", tmp_path / "m")
    document = json.loads((GOLDENS / "llama" / "config.json").read_text())
    for change, said in (
        ({"model_type": "mamba9"}, "does not know model_type 'mamba9'"),
        ({"quantization_config": {"quant_method": "exl2"}}, "quant_method 'exl2' is not read"),
    ):
        (tmp_path / "m" / "config.json").write_text(json.dumps(document | change))
        assert run(tmp_path / "m", "--json") == 1
        out, err = capsys.readouterr()
        made = json.loads(out)
        assert said in made["refused"] and said in err
        assert made["totals"]["float32"]["tensors"] == 30
        assert made["model_type"] == change.get("model_type", "llama")
    assert made["scheme"] == "exl2"
    (tmp_path / "m" / "config.json").unlink()
    assert run(tmp_path / "m") == 1
    out, err = capsys.readouterr()
    assert "30 tensors" in out and "has no config.json" in err


def test_a_header_that_is_not_whole_is_refused_with_what_the_config_says(capsys):
    assert run(MALFORMED / "truncated") == 1
    out, err = capsys.readouterr()
    assert "vocabulary" in out and "truncated" in err


def test_wrong_command_lines(tmp_path, capsys):
    assert run() == run("a", "b") == run("--x") == 2
    assert "name one folder or GGUF" in capsys.readouterr().err
    assert run(tmp_path / "nothing") == 1
    out, err = capsys.readouterr()
    assert out == "" and "there is no folder" in err


def test_it_is_a_command_that_imports_no_jax():
    code = (
        "import sys, converters.inspect as command; command.main(['x', sys.argv[1]]);"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(GOLDENS / "llama")], capture_output=True, text=True
    )
    assert done.stdout.endswith("\nFalse\n") and "attn.q_D_NH" in done.stdout
    helped = subprocess.run(
        [sys.executable, "-m", "converters.inspect", "--help"], capture_output=True, text=True
    )
    assert helped.returncode == 0 and "--[no]json" in helped.stdout and helped.stderr == ""


def test_ranges():
    assert ranges([3, 0, 1, 2, 5]) == "0-3, 5"
