"""--to=hf gives back the bytes that a checkpoint was converted from, in files that others read."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from converters import open_checkpoint
from converters.formats.safetensors import read_folder, read_tensor
from converters.formats.safetensors_write import lay_out, writable, write_headers
from tests.checkpoints import (
    ENCODER_DECODERS,
    FAMILIES,
    GOLDENS,
    MULTIMODAL,
    QUANTIZED_GOLDENS,
    config,
    tensors,
    write,
)
from tests.test_convert import fails, run
from tests.test_weights import parameters
from xlinfer.converted import save_converted
from xlinfer.export import export
from xlinfer.weights import load_model

# Tables whose first two rows no token reads, so that no parameter holds them.
UNREAD_ROWS = {
    "opt": ["model.decoder.embed_positions.weight"],
    "bart": [f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")],
}


def silent(phase, done, total):
    pass


def held(folder, text_only=False):
    """dtype, shape and bytes of every tensor, by name."""
    infos = open_checkpoint(folder, text_only=text_only).tensors
    return {n: (i.dtype.name, i.shape, read_tensor(i).tobytes()) for n, i in infos.items()}


@pytest.mark.parametrize("name", FAMILIES + ENCODER_DECODERS + MULTIMODAL)
def test_what_was_converted_comes_back_bit_for_bit(name, tmp_path, caplog):
    source, text_only = GOLDENS / name, name in MULTIMODAL
    model = load_model(source, text_only=text_only)
    save_converted(model, source, tmp_path / "converted", text_only=text_only)
    export(open_checkpoint(tmp_path / "converted"), tmp_path / "hf", None, silent)
    want, got = held(source, text_only), held(tmp_path / "hf")
    for table in UNREAD_ROWS.get(name, []):
        dtype, shape, data = want[table]
        unread = 2 * shape[1] * 4
        want[table] = dtype, shape, bytes(unread) + data[unread:]
        assert table in caplog.text
    assert got == want
    assert not (tmp_path / "hf" / "xlinfer.json").exists()
    a, b = ((f / "config.json").read_bytes() for f in (tmp_path / "converted", tmp_path / "hf"))
    assert a == b


@pytest.mark.parametrize("name", ["phi3", "bloom"])
def test_logits_are_equal(name, tmp_path):
    source = GOLDENS / name
    model = load_model(source)
    save_converted(model, source, tmp_path / "converted")
    export(open_checkpoint(tmp_path / "converted"), tmp_path / "hf", None, silent)
    tokens = jnp.arange(8)[None]
    np.testing.assert_array_equal(load_model(tmp_path / "hf")(tokens), model(tokens))


@pytest.mark.parametrize("name", ["opt", "falcon-grouped"])
def test_a_hugging_face_one_is_copied_whole(name, tmp_path):
    assert run(f"--model={GOLDENS / name}", f"--output={tmp_path / 'hf'}", "--to=hf") == 0
    assert held(tmp_path / "hf") == held(GOLDENS / name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """bf16, eleven layers, a tokenizer, a copy of the tied head, a table that nothing reads."""
    cfg = config(num_hidden_layers=11, tie_word_embeddings=True, dtype="bfloat16")
    weights = tensors(cfg, ml_dtypes.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, ml_dtypes.bfloat16)
    return write(tmp_path_factory.mktemp("source"), cfg, weights, tokenizer={"model": {}})


def test_files_are_what_save_pretrained_writes(source, tmp_path):
    placed = export(open_checkpoint(source), tmp_path / "hf", None, silent, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in placed.values())
    order = [name for name in placed if name.endswith("q_proj.weight")]
    assert order == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(11)]
    for file in files:
        with safe_open(tmp_path / "hf" / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = set(opened.keys())
        infos = [placed[name] for name in names]
        assert sum(info.nbytes for info in infos) <= 20_000
        assert all(info.offset % info.dtype.itemsize == 0 for info in infos)
    want = held(source)
    for lost in ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        want.pop(lost)  # tied, and derived
    assert held(tmp_path / "hf") == want
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


def test_another_dtype_is_said_in_the_config(source, tmp_path, capsys):
    out = tmp_path / "hf"
    assert run(f"--model={source}", f"--output={out}", "--to=hf", "--dtype=float32") == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    a, b = (parameters(load_model(folder, dtype="float32")) for folder in (out, source))
    for name, array in b.items():
        np.testing.assert_array_equal(a[name], array, err_msg=name)
    printed = capsys.readouterr().out
    size = sum(array.nbytes for array in b.values())
    assert printed == f"{out}: {len(held(out))} tensors, {size:,} bytes, float32\n"


def test_dtypes_of_all_widths_lie_at_multiples_of_their_width(tmp_path):
    kinds = {"int8": (3,), "float32": (2, 2), "bfloat16": (1,), "float64": (0, 4)}
    shapes = {name: (np.dtype(name), shape) for name, shape in kinds.items()}
    placed = lay_out(tmp_path, shapes)
    write_headers(placed)
    for i, info in enumerate(placed.values()):
        assert info.offset % info.dtype.itemsize == 0
        writable(info)[...] = i
    assert read_folder(tmp_path) == placed
    for i, info in enumerate(placed.values()):
        assert (read_tensor(info) == i).all()


def test_what_is_not_written_is_refused(source, tmp_path, capsys):
    to = ("--to=hf", f"--output={tmp_path / 'hf'}")
    assert "is a GGUF" in fails(capsys, 1, f"--model={GOLDENS / 'gguf-q8_0'}", *to)
    quantized = QUANTIZED_GOLDENS / "gptq-v1-sym-g32"
    assert "copy its folder" in fails(capsys, 1, f"--model={quantized}", *to)
    assert "not empty" in fails(capsys, 1, f"--model={source}", "--to=hf", f"--output={source}")
    assert not (tmp_path / "hf").exists()


def test_a_draft_that_fails_leaves_nothing(tmp_path):
    source = GOLDENS / "llama"
    save_converted(load_model(source), source, tmp_path / "converted")
    (tmp_path / "converted" / "parameters").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="parameter embed_VD cannot be read"):
        export(open_checkpoint(tmp_path / "converted"), tmp_path / "out" / "hf", None, silent)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dry_run_names_every_source_and_writes_nothing(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("converters.read_tensor", None)  # a byte of a weight would be read by it
    out = tmp_path / "out"
    assert run(f"--model={source}", f"--output={out}", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    monkeypatch.undo()
    q = next(line for line in lines if line.startswith("layers.0.attn.q_D_NH "))
    assert q.endswith("<- (N H) D -> D (N H): model.layers.{0-10}.self_attn.q_proj.weight")
    assert "not read: lm_head.weight, 1 of 2,048 bytes: a copy of" in "\n".join(lines)
    assert any(line.startswith("not read: model.layers.*.self_attn.rotary") for line in lines)
    total = sum(array.nbytes for array in parameters(load_model(source, dtype="bfloat16")).values())
    assert lines[-1] == f"{total:,} bytes to write"
    assert not out.exists()


def test_a_dry_run_of_the_way_back(tmp_path, capsys):
    source = GOLDENS / "phi3"
    save_converted(load_model(source), source, tmp_path / "converted")
    out = f"--output={tmp_path / 'hf'}"
    assert run(f"--model={tmp_path / 'converted'}", out, "--to=hf", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    fused = next(line for line in lines if ".layers.1.self_attn.qkv_proj.weight" in line)
    for part in ("q_D_NH[1:2, 0:32, 0:32]", "k_D_KH[1:2, 0:32, 0:16]", "v_D_KH[1:2, "):
        assert f"layers.0.attn.{part}" in fused
    assert len(lines) == len(held(source)) + 1 and not (tmp_path / "hf").exists()


def test_a_dry_run_refuses_what_a_run_would(tmp_path, capsys):
    missing, out = GOLDENS.parent / "malformed" / "missing", f"--output={tmp_path / 'x'}"
    for to in ("orbax", "hf"):
        err = fails(capsys, 1, f"--model={missing}", out, "--dry_run", f"--to={to}")
        assert "missing: model.layers.0.mlp.up_proj.weight" in err
