"""A converted checkpoint gives back the same bits, and refuses what it cannot vouch for."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters import CheckpointError, open_checkpoint
from tests.checkpoints import GOLDENS, QUANTIZED_GOLDENS, config, tensors, write
from tests.test_weights import parameters
from xlinfer.convert import main
from xlinfer.converted import save_converted
from xlinfer.mesh import make_mesh
from xlinfer.weights import load_model, stored_dtype


def run(*flags):
    return main(["convert", *map(str, flags)])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A bf16 checkpoint with biases, a tokenizer and a template beside it."""
    cfg = config(attention_bias=True)
    folder = tmp_path_factory.mktemp("source")
    write(
        folder,
        cfg,
        tensors(cfg, ml_dtypes.bfloat16),
        generation_config={"eos_token_id": [2, 3], "temperature": 0.5},
        tokenizer={"model": {}},
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out") / "deep" / "converted"
    assert run(f"--model={source}", f"--output={directory}") == 0
    return directory


@pytest.fixture
def damaged(converted, tmp_path):
    """A copy of the converted to spoil."""
    return shutil.copytree(converted, tmp_path / "converted")


def test_the_round_trip_is_bit_equal(source, converted):
    want = parameters(load_model(source, dtype="bfloat16"))
    got = parameters(load_model(converted, dtype="bfloat16"))
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == ml_dtypes.bfloat16
        assert got[name].tobytes() == array.tobytes(), name
    assert stored_dtype(open_checkpoint(converted)) == ml_dtypes.bfloat16


def test_a_converted_one_is_a_checkpoint_with_all_its_files(source, converted):
    a, b = open_checkpoint(converted), open_checkpoint(source)
    assert a.config == b.config and a.generation == b.generation
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()
    assert not (converted / "pytorch_model.bin").exists()
    assert os.listdir(converted.parent) == ["converted"]  # no draft stays behind
    manifest = json.loads((converted / "xlinfer.json").read_text())
    assert manifest["format_version"] == 3 and manifest["dtype"] == "bfloat16"
    assert len(manifest["source_sha256"]["model.safetensors"]) == 64
    assert manifest["parameters"]["embed_VD"] == {"shape": [64, 16], "dtype": "bfloat16"}


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_converted_one_loads_onto_any_mesh(source, converted, devices):
    mesh = make_mesh(devices)
    want, got = load_model(source, mesh=mesh), load_model(converted, mesh=mesh)
    assert got.cfg == want.cfg
    a, b = parameters(got), parameters(want)
    for name, array in b.items():
        assert a[name].dtype == np.float32  # auto, on CPU
        np.testing.assert_array_equal(a[name], array, err_msg=name)
    k = got.layers[0].attn.k_D_KH.get_value()
    assert k.sharding.is_equivalent_to(want.layers[0].attn.k_D_KH.get_value().sharding, k.ndim)
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(got(tokens), want(tokens))


@pytest.mark.parametrize("devices, own", [(1, 1), (4, 4), (4, 2)])  # the last share experts
def test_experts_come_back_from_a_converted_one(devices, own, tmp_path):
    cfg = config("qwen2_moe")
    source = write(tmp_path / "source", cfg, tensors(cfg, ml_dtypes.bfloat16))
    assert run(f"--model={source}", f"--output={tmp_path / 'out'}") == 0
    mesh = make_mesh(devices, expert_parallel_size=own)
    got, want = load_model(tmp_path / "out", mesh=mesh), load_model(source, mesh=mesh)
    a, b = parameters(got), parameters(want)
    assert a.keys() == b.keys() and "layers.0.moe.gate_up_EID" in a
    for name, array in b.items():
        np.testing.assert_array_equal(a[name], array, err_msg=name)


def test_the_text_model_alone_becomes_a_checkpoint_of_its_own(tmp_path):
    source, out = GOLDENS / "gemma3-images", tmp_path / "out"
    assert run(f"--model={source}", f"--output={out}", "--text-only") == 0
    got, want = load_model(out), load_model(source, text_only=True)
    assert got.cfg == want.cfg and got.cfg.model_type == "gemma3_text"
    a, b = parameters(got), parameters(want)
    assert a.keys() == b.keys()
    for name, array in b.items():
        np.testing.assert_array_equal(a[name], array, err_msg=name)


def test_dtype_flag_and_report(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(f"--model={source}", f"--output={out}", "--dtype=float32") == 0
    count = sum(array.size for array in parameters(load_model(source)).values())
    line = f"{out}: {count:,} parameters, {4 * count:,} bytes, float32\n"
    assert capsys.readouterr().out == line


def test_progress_counts_bytes(converted):
    seen = []
    load_model(converted, progress=lambda *at: seen.append(at))
    assert seen[0][:2] == ("load", 0) and seen[-1][1] == seen[-1][2] > 0


def fails(capsys, code, *flags):
    assert run(*flags) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xlinfer.convert: ") and err.count("\n") == 1, err
    return err


def test_one_line_for_what_cannot_be_converted(source, converted, tmp_path, capsys):
    out = f"--output={tmp_path / 'out'}"
    assert "there is no folder" in fails(capsys, 1, "--model=/no/such", out)
    assert "fetched from the hub" in fails(capsys, 1, "--model=some/model", out)
    assert "converted already" in fails(capsys, 1, f"--model={converted}", out)
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("")
    assert "not empty" in fails(capsys, 1, f"--model={source}", f"--output={full}")
    assert "not empty" in fails(capsys, 1, f"--model={source}", f"--output={full / 'x'}")
    assert not (tmp_path / "out").exists()


def test_an_empty_directory_is_taken(source, tmp_path):
    assert run(f"--model={source}", f"--output={tmp_path}") == 0
    assert (tmp_path / "xlinfer.json").is_file()


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "--model is required"),
        (["--model=x"], "--output is required"),
        (["--model=x", "--output=y", "--dtype=int3"], "int3"),
        (["--model=x", "--output=y", "--modell=z"], "modell"),
        (["--model=x", "--output=y", "z"], "unexpected argument 'z'"),
    ],
)
def test_wrong_flags(given, message, capsys):
    assert message in fails(capsys, 2, *given)


def test_help_and_no_traceback():
    command = [sys.executable, "-m", "xlinfer.convert"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--output" in helped.stdout
    wrong = subprocess.run(
        [*command, "--model=/no/such", "--output=y"], capture_output=True, text=True
    )
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr


def test_a_gguf_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a GGUF, which has no"):
        save_converted(load_model(GOLDENS / "llama"), GOLDENS / "gguf-q4_0", tmp_path / "out")


def test_a_quantized_one_is_refused(tmp_path, capsys):
    source = QUANTIZED_GOLDENS / "gptq-v1-sym-g32"
    err = fails(capsys, 1, f"--model={source}", f"--output={tmp_path / 'out'}")
    assert "is quantized (gptq); only float weights are converted" in err


def test_other_versions_are_refused(damaged):
    path = damaged / "xlinfer.json"
    manifest = json.loads(path.read_text())
    for version in (0, 1, 2, "1", None):
        path.write_text(json.dumps({**manifest, "format_version": version}))
        with pytest.raises(CheckpointError, match=f"format_version is {version!r}; .* reads 3"):
            load_model(damaged)
    del manifest["format_version"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format_version is None"):
        load_model(damaged)


def test_damaged_ones_are_refused(damaged):
    path = damaged / "xlinfer.json"
    manifest = json.loads(path.read_text())
    for change in ({"parameters": None}, {"parameters": {"x": 1}}, {"dtype": 3}):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(damaged)
    del manifest["parameters"]["embed_VD"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="embed_VD is None, should be"):
        load_model(damaged)


def test_lost_parameters_are_refused(damaged):
    (damaged / "parameters").rename(damaged / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(damaged)


def test_a_folder_that_all_may_write_is_refused(damaged):
    damaged.chmod(0o777)
    with pytest.raises(CheckpointError, match="chmod o-w"):
        load_model(damaged)


def test_a_model_with_repeated_kv_heads_is_not_saved(source, tmp_path):
    model = load_model(source, mesh=make_mesh(4))
    with pytest.raises(CheckpointError, match="without repeated kv heads"):
        save_converted(model, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_checkpoint_is_not_saved(source, tmp_path):
    with pytest.raises(CheckpointError, match="config is not that of"):
        save_converted(load_model(GOLDENS / "llama"), source, tmp_path / "out")
