"""Encoder-decoder models against transformers' logits, and their parts against the formulas."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import CheckpointError, open_checkpoint
from converters.families import parse_config
from tests.checkpoints import ENCODER_DECODERS, GOLDENS
from tests.models.test_transformer import ATOL
from xlinfer.config import RelativePositions
from xlinfer.mesh import make_mesh
from xlinfer.models import EncoderDecoderLM
from xlinfer.models.encoder_decoder import distance_buckets
from xlinfer.weights import load_model


@jax.jit
def forward(model, inputs_BS, tokens_BT, lengths_B=None):
    return model(inputs_BS, tokens_BT, lengths_B)


def golden_of(name: str) -> dict[str, np.ndarray]:
    golden = load_file(GOLDENS / name / "golden.safetensors")
    return {k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in golden.items()}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_logits_equal_transformers(name, devices):
    want = golden_of(name)
    model = load_model(GOLDENS / name, mesh=make_mesh(devices))
    assert isinstance(model, EncoderDecoderLM)
    got = forward(model, want["input_ids"], want["decoder_input_ids"])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want["logits"], atol=ATOL["golden"], rtol=0)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_both_config_styles_say_the_same(name):
    five, four = (GOLDENS / name / file for file in ("config.json", "config_v4.json"))
    assert parse_config(five, json.loads(five.read_text())) == parse_config(
        four, json.loads(four.read_text())
    )


@pytest.mark.parametrize("name", ["t5-relu", "bart"])
def test_padding_of_the_encoders_input_is_never_seen(name):
    golden, model = golden_of(name), load_model(GOLDENS / name)
    inputs, tokens = golden["input_ids"], golden["decoder_input_ids"]
    lengths = np.array([32, 19], np.int32)
    got = forward(model, inputs, tokens, lengths)
    np.testing.assert_allclose(got[0], golden["logits"][0], atol=ATOL["golden"], rtol=0)
    short = forward(model, inputs[1:, :19], tokens[1:])
    np.testing.assert_allclose(got[1], short[0], atol=ATOL["same"], rtol=0)
    assert np.abs(got[1] - golden["logits"][1]).max() > 1e-2


def test_later_tokens_do_not_reach_earlier_ones_but_every_input_reaches_all():
    golden, model = golden_of("t5"), load_model(GOLDENS / "t5")
    inputs, tokens = golden["input_ids"][:1], golden["decoder_input_ids"][:1]
    before = forward(model, inputs, tokens)[0]
    late = tokens.copy()
    late[0, 9] = 3 + late[0, 9] % 150
    after = forward(model, inputs, late)[0]
    np.testing.assert_array_equal(before[:9], after[:9])
    assert jnp.abs(before[9:] - after[9:]).max() > 1e-2
    last = inputs.copy()
    last[0, -1] = 3 + last[0, -1] % 150
    assert (jnp.abs(before - forward(model, last, tokens)[0]).max(-1) > 1e-4).all()


def test_buckets_are_the_published_ones():
    """32 buckets to a distance of 128, as every published T5 has them: the first distance of each
    bucket, from tensorflow's and torch's code."""
    relative = RelativePositions(num_buckets=32, max_distance=128)
    decoder = distance_buckets(relative, both_ways=False)
    behind = decoder[128::-1]  # at distance 0, 1, ...
    firsts = [int(np.argmax(behind == bucket)) for bucket in range(32)]
    assert firsts == [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert (np.diff(behind) >= 0).all() and behind[-1] == 31 and not decoder[129:].any()
    encoder = distance_buckets(relative, both_ways=True)
    behind, ahead = encoder[128::-1], encoder[128:]
    firsts = [int(np.argmax(behind == bucket)) for bucket in range(16)]
    assert firsts == [*range(9), 12, 16, 23, 32, 46, 64, 91]
    assert (ahead[1:] == behind[1:] + 16).all() and ahead[0] == 0


def changed(folder, name, drop=(), **config):
    """A copy of a golden with another config.json, and without some tensors."""
    values = json.loads((GOLDENS / name / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    held = load_file(GOLDENS / name / "model.safetensors")
    save_file({k: v for k, v in held.items() if k not in drop}, folder / "model.safetensors")
    return folder, held


def test_float16_is_refused_where_it_overflows():
    with pytest.raises(ValueError, match=r"float16, which t5 overflows.*bfloat16 or float32"):
        load_model(GOLDENS / "t5", dtype="float16")
    assert load_model(GOLDENS / "bart", dtype="float16").embed_VD[...].dtype == jnp.float16


@pytest.mark.parametrize("name, shared", [("t5", "shared.weight"), ("bart", "model.shared.weight")])
def test_copies_of_the_embedding_are_checked(name, shared, tmp_path):
    folder, held = changed(tmp_path, name)
    copy = shared.replace("shared", "encoder.embed_tokens")
    old = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": held[shared]}
    held |= {copy: held[shared]} | (old if name == "t5" else {})
    save_file(held, folder / "model.safetensors")
    load_model(folder)
    save_file(held | {copy: held[shared] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{copy!r} is there and differs from {shared!r}"):
        load_model(folder)


def test_an_untied_head_is_no_copy_and_the_embeddings_are(tmp_path):
    folder, held = changed(tmp_path, "t5-untied")
    wrong = {"decoder.embed_tokens.weight": held["lm_head.weight"]}
    save_file(held | wrong, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"config\.json makes them one.*decoder\.embed_tokens"
    ):
        load_model(folder)


def test_a_missing_logits_bias_is_zero(tmp_path):
    golden = golden_of("bart")
    folder, held = changed(tmp_path, "bart", drop=("final_logits_bias",))
    got = forward(load_model(folder), golden["input_ids"], golden["decoder_input_ids"])
    want = golden["logits"] - held["final_logits_bias"]
    np.testing.assert_allclose(got, want, atol=ATOL["golden"], rtol=0)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("t5", {"feed_forward_proj": "gated-tanh"}, "'feed_forward_proj' is 'gated-tanh'"),
        ("t5", {"relative_attention_num_buckets": 7}, "relative_attention_num_buckets 7"),
        ("t5", {"relative_attention_max_distance": 16}, "relative_attention_max_distance 16"),
        ("t5", {"is_encoder_decoder": False}, "'is_encoder_decoder' is False"),
        ("t5", {"pad_token_id": None}, "'decoder_start_token_id' is None"),
        ("t5", {"d_relative": 3}, "unknown model constant 'd_relative'"),
        ("bart", {"encoder_ffn_dim": 40}, "'encoder_ffn_dim' is 40 and 'decoder_ffn_dim' 48"),
        ("bart", {"normalize_before": True}, "'normalize_before' is True"),
        ("bart", {"decoder_start_token_id": -1}, "'decoder_start_token_id' is -1"),
    ],
)
def test_what_is_not_computed_is_named(name, change, message, tmp_path):
    folder, _ = changed(tmp_path, name, **change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_what_the_decoder_begins_with(tmp_path):
    start = lambda folder: open_checkpoint(folder).generation.decoder_start_token_ids
    assert start(GOLDENS / "t5") == (0,)  # its padding token, where the file says nothing
    assert start(GOLDENS / "bart") == (2, 0)  # generation_config.json forces a first token
    assert start(GOLDENS / "llama") == ()
    folder, _ = changed(tmp_path, "bart", forced_bos_token_id=5)
    assert start(folder) == (2, 5)
    asked = {"decoder_start_token_id": 7, "forced_bos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    assert start(folder) == (7, 5)
