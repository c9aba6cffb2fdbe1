"""The text model alone, of a checkpoint that has more."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from converters import CheckpointError, LeftOut, open_checkpoint
from converters.multimodal import MULTIMODAL
from tests.checkpoints import GOLDENS, config, tensors, write
from xlinfer.config import DefaultRope, LinearRope


def wrapped(kind, text, **outer):
    return {"model_type": kind, "text_config": text, "vision_config": {}, **outer}


def held_by(kind="old"):
    """A Llama's tensors, by the names of transformers 4 or 5, beside two of a vision tower."""
    own = tensors(config())
    if kind == "old":
        held = {f"language_model.{name}": array for name, array in own.items()}
        at = ""
    else:
        inner = lambda name: name.replace("model.", "model.language_model.", 1)
        held = {inner(name): array for name, array in own.items()}
        at = "model."
    held[f"{at}vision_tower.encoder.weight"] = np.zeros((3, 5), np.float32)
    held[f"{at}vision_tower.encoder.bias"] = np.zeros(3, np.float32)
    held[f"{at}multi_modal_projector.linear_1.weight"] = np.zeros(7, np.float32)
    return held, at


def text_of(folder, document):
    (folder / "config.json").write_text(json.dumps(document))
    return open_checkpoint(folder, text_only=True)


def test_a_published_config_says_only_what_is_no_default(tmp_path):
    """Gemma 3 4B's, without its vision."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    document = wrapped(
        "gemma3", text, eos_token_id=[1, 106], torch_dtype="bfloat16", mm_tokens_per_image=256
    )
    found = text_of(tmp_path, document)
    cfg = found.config
    assert (cfg.hidden_size, cfg.num_layers, cfg.intermediate_size) == (2560, 34, 10240)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim) == (8, 4, 256)
    assert (cfg.vocab_size, cfg.max_position_embeddings) == (262_208, 131_072)
    assert cfg.ropes[4:6] == (
        DefaultRope(theta=10_000.0), LinearRope(theta=1_000_000.0, factor=8.0),
    )  # fmt: skip
    assert cfg.windows[4:6] == (1024, None) and cfg.tie_word_embeddings
    assert found.generation.eos_token_ids == (1, 106)
    assert found.document["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_without_the_flag_the_error_names_it(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(wrapped(kind, config())))
    with pytest.raises(CheckpointError, match=f"'{kind}' reads images .*--text_only"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["old", "new"])
def test_either_transformers_names_are_read(kind, tmp_path):
    held, at = held_by(kind)
    folder = write(tmp_path / kind, wrapped("llava", config()), held)
    found = open_checkpoint(folder, text_only=True)
    plain = open_checkpoint(write(tmp_path / "plain", config(), tensors(config())))
    assert found.config == plain.config
    place = lambda checkpoint: {(s.rule.target, s.start) for s in checkpoint.schedule()}
    assert place(found) == place(plain)
    assert found.left_out == (
        LeftOut(f"{at}multi_modal_projector", 1, 28), LeftOut(f"{at}vision_tower", 2, 72),
    )  # fmt: skip


def test_what_is_neither_text_nor_vision_is_left_over(tmp_path):
    held, _ = held_by()
    held["vision_tower_2.weight"] = held["audio_tower.weight"] = np.zeros(1, np.float32)
    found = open_checkpoint(write(tmp_path, wrapped("llava", config()), held), text_only=True)
    with pytest.raises(CheckpointError, match=r"left over.*: audio_tower.weight, vision_tower_2"):
        found.schedule()


def test_a_text_model_is_all_text(tmp_path):
    folder = write(tmp_path, config(), tensors(config()))
    found, plain = open_checkpoint(folder, text_only=True), open_checkpoint(folder)
    assert found == plain and found.left_out == ()


@pytest.mark.parametrize(
    "outer, inner, tied",
    [
        ({}, {}, False),
        ({"tie_word_embeddings": True}, {}, True),
        ({"tie_word_embeddings": False}, {}, False),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True),
    ],
)
def test_either_config_ties_the_head(outer, inner, tied, tmp_path):
    text = {**config("mistral", tie_word_embeddings=...), **inner}
    found = text_of(tmp_path, wrapped("mistral3", text, **outer))
    assert found.config.tie_word_embeddings is tied


@pytest.mark.parametrize(
    "document, message",
    [
        (wrapped("gemma3", None), "'text_config' of a gemma3 model must be an object"),
        (wrapped("llava", {"model_type": "cohere2"}), "does not know model_type 'cohere2'"),
        (wrapped("llava", config(foo=1)), "unknown model constant 'foo'"),
        (config("paligemma"), "does not know model_type 'paligemma'"),
        (
            wrapped("llava", config(), quantization_config={"quant_method": "exl2"}),
            "exl2",
        ),
    ],
)
def test_configs_that_are_refused(document, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        text_of(tmp_path, document)


def test_a_golden_names_its_tensors_as_transformers_4_does():
    held = load_file(GOLDENS / "gemma3-images" / "model.safetensors")
    tops = {name.split(".")[0] for name in held}
    assert tops == {"language_model", "multi_modal_projector", "vision_tower"}
