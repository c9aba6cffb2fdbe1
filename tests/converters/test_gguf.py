"""Checkpoints of every architecture, converted to GGUF, are read back as what they were."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from converters import CheckpointError, open_checkpoint, read_tensor
from converters.formats.gguf import GGUFTensor
from tests.checkpoints import GOLDENS, config, float_steps, tensors, write
from tests.gguf_convert import permuted, to_gguf
from tests.gguf_files import write_gguf
from xlinfer.config import DefaultRope, LinearRope, LongRope, YarnRope
from xlinfer.models.rope import rope_frequencies
from xlinfer.weights import load_model

# What GGUF cannot say, or says otherwise, of some goldens.
DIFFERS = {
    # llama.cpp's name for Mistral, whose window the converter leaves out.
    "mistral-window": {"model_type": "llama", "windows": (None,) * 3},
    # Not in the file; llama.cpp knows that of the published models.
    "gemma2": {"attention_scale": 16**-0.5},
    "gemma3": {"attention_scale": 16**-0.5},
    # llama.cpp computes every fourth layer without a rope.
    "smollm3": {"ropes": (*(DefaultRope(theta=2e6),) * 3, None)},
}
ALL = (
    *("gemma", "gemma2", "gemma3", "granite", "llama", "llama3-rope", "mistral-window", "mixtral"),
    *("olmo2", "phi", "phi3", "phi3-longrope", "qwen2", "qwen3", "qwen3-moe", "smollm3"),
    *("stablelm", "stablelm-parallel", "starcoder2"),
)


def same(converted, source):
    """Every tensor, by name: exactly, but Gemma's norms, which have lost bits to 1 + w."""
    held, want = converted.tensors, load_file(source.path / "model.safetensors")
    assert held.keys() == want.keys()
    for name, array in want.items():
        got = read_tensor(held[name])
        atol = 1e-6 if isinstance(held[name], GGUFTensor) and held[name].added else 0
        np.testing.assert_allclose(got, array, rtol=0, atol=atol, err_msg=name)
    converted.schedule()


@pytest.mark.parametrize("golden", ALL)
def test_goldens_as_gguf(golden, tmp_path):
    converted = open_checkpoint(to_gguf(GOLDENS / golden, tmp_path / "m.gguf"))
    source = open_checkpoint(GOLDENS / golden)
    same(converted, source)
    want = replace(source.config, **DIFFERS.get(golden, {}))
    if golden == "llama3-rope":
        ropes = converted.config.ropes[0], want.ropes[0]
        ours, theirs = (rope_frequencies(rope, 8, 1024)[0] for rope in ropes if rope is not None)
        np.testing.assert_allclose(ours, theirs, rtol=3e-7)
        want = replace(want, ropes=converted.config.ropes)
    if golden == "phi3-longrope":  # float32 in the file
        (rope,), (was,) = set(converted.config.ropes), set(want.ropes)
        assert isinstance(rope, LongRope) and isinstance(was, LongRope)
        np.testing.assert_allclose(rope.long_factors, was.long_factors, rtol=1e-7)
        np.testing.assert_allclose(rope.short_factors, was.short_factors, rtol=1e-7)
        assert rope.attention_factor == pytest.approx(was.attention_factor, rel=1e-6)
        want = replace(want, ropes=converted.config.ropes)
    assert converted.config == want


@pytest.mark.parametrize("model_type", ["qwen2_moe", "mixtral", "qwen3_moe"])
def test_experts_as_gguf(model_type, tmp_path):
    cfg = config(model_type)
    folder = write(tmp_path / "hf", cfg, tensors(cfg))
    converted, source = (
        open_checkpoint(to_gguf(folder, tmp_path / "m.gguf")),
        open_checkpoint(folder),
    )
    same(converted, source)
    moe = source.config.moe
    assert moe is not None
    moe = replace(moe, norm_topk_prob=model_type != "qwen2_moe")
    assert converted.config == replace(source.config, moe=moe)


@pytest.mark.parametrize("name", ["llama3-rope", "smollm3", "gemma3"])
def test_logits(name, tmp_path):
    """Where what is read back differs in form, what is computed does not."""
    source = GOLDENS / name
    if name != "llama3-rope":  # with the constants that GGUF cannot say made those it means
        cfg = json.loads((source / "config.json").read_text())
        cfg |= {
            "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
            "gemma3": {"query_pre_attn_scalar": 16},
        }[name]
        source = write(tmp_path / "hf", cfg, load_file(source / "model.safetensors"))
    tokens = jnp.asarray(load_file(GOLDENS / name / "golden.safetensors")["input_ids"])
    with jax.default_matmul_precision("highest"):
        got, want = (
            np.asarray(load_model(path, dtype="float32")(tokens))
            for path in (to_gguf(source, tmp_path / "m.gguf"), source)
        )
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)
    if name == "llama3-rope":
        golden = load_file(GOLDENS / name / "golden.safetensors")["logits"]
        np.testing.assert_allclose(got, golden, rtol=0, atol=2e-4)


def test_half_precision_keeps_its_dtype(tmp_path):
    converted = open_checkpoint(to_gguf(GOLDENS / "llama", tmp_path / "m.gguf", dtype=np.float16))
    want = load_file(GOLDENS / "llama" / "model.safetensors")
    for step in float_steps(converted):
        name, array = step.tensor.name, want[step.tensor.name]
        assert step.tensor.dtype == (np.float16 if array.ndim > 1 else np.float32)
        np.testing.assert_array_equal(
            read_tensor(step.tensor), array.astype(step.tensor.dtype), name
        )


def test_rows_of_blocks_are_moved_as_they_are(tmp_path):
    """The order of rows is data: of packed bytes as of floats."""
    golden = GOLDENS / "gguf-q4_0" / "model.gguf"
    q = open_checkpoint(golden).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(q, GGUFTensor) and q.paired_heads == 4 and q.row_order is not None
    rows, stored = np.arange(q.shape[0]), read_tensor(replace(q, paired_heads=None))
    np.testing.assert_array_equal(permuted(q.row_order, 4), rows)
    np.testing.assert_array_equal(permuted(read_tensor(q), 4), stored)
    assert stored.shape == (128, 128 // 32 * 18) and q.shape == (128, 128)


def test_what_reference_config_json_says(tmp_path):
    config = open_checkpoint(GOLDENS / "gguf-q8_0" / "model.gguf").config
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (2, 128, 256)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 32)
    assert config.ropes == (DefaultRope(theta=10_000.0),) * 2 and config.norm_eps == 1e-6
    assert config.vocab_size == 160 and not config.tie_word_embeddings


KEYS = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.block_count": 1,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
EMBEDDING = {"token_embd.weight": ("F32", (8, 16), bytes(8 * 16 * 4))}


def opened(folder, keys, held=EMBEDDING):
    keys = {key: value for key, value in {**KEYS, **keys}.items() if value is not ...}
    return open_checkpoint(write_gguf(folder / "m.gguf", keys, held))


def floats(*values):
    return ("F32", (len(values),), np.array(values, np.float32).tobytes())


@pytest.mark.parametrize(
    "keys, rope",
    [
        ({}, DefaultRope(theta=10_000.0)),
        ({"llama.rope.freq_base": 5e5}, DefaultRope(theta=5e5)),
        ({"llama.rope.scaling.type": "none"}, DefaultRope(theta=10_000.0)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            LinearRope(theta=10_000.0, factor=4.0),
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 16,
            },
            YarnRope(
                theta=10_000.0,
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=32.0,
                beta_slow=1.0,
                attention_factor=0.1 * np.log(4) + 1,
                truncate=True,
            ),
        ),
    ],
)
def test_ropes(keys, rope, tmp_path):
    assert opened(tmp_path, keys).config.ropes == (rope,)


def test_keys_that_may_be_absent_or_lists(tmp_path):
    config = opened(tmp_path, {"llama.attention.head_count_kv": ...}).config
    assert config.num_kv_heads == 4 and config.head_dim == 4 and config.tie_word_embeddings
    lists = opened(tmp_path, {"llama.attention.head_count_kv": [2, 2]}).config
    assert lists.num_kv_heads == 2


@pytest.mark.parametrize(
    "keys, held, message",
    [
        ({"general.architecture": "mamba"}, {}, "does not read general.architecture 'mamba'"),
        ({"general.architecture": ...}, {}, "architecture 'None'"),
        ({"general.type": "adapter"}, {}, "holds no model: its general.type is 'adapter'"),
        ({"llama.block_count": ...}, {}, r"lacks llama\.block_count"),
        ({"llama.block_count": "2"}, {}, "'block_count' is '2'; it must be an integer"),
        ({"llama.logit_scale": 2.0}, {}, "unknown model constant 'logit_scale'"),
        ({"llama.attention.sliding_window": 8}, {}, "'attention.sliding_window'"),
        ({"llama.attention.head_count_kv": [2, 1]}, {}, "head_count_kv differs by layer"),
        ({"llama.attention.key_length": 8}, {}, "key_length and attention.value_length differ"),
        ({"llama.rope.dimension_count": 2}, {}, "rope.dimension_count is 2 where a head has 4"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type is 'longrope'"),
        ({"llama.rope.scaling.attn_factor": 2.0}, {}, "attn_factor is 2.0"),
        ({"llama.attention.causal": False}, {}, "'attention.causal' is False"),
        (
            {"llama.rope.scaling.type": "yarn"},
            {"rope_freqs.weight": floats(1, 2)},
            "rope_freqs and rope.scaling.type 'yarn'",
        ),
        ({}, {"rope_freqs.weight": ("F32", (1, 2), bytes(8))}, "must be a row of floats"),
        ({}, {"rope_freqs.weight": floats(1, 2, 3)}, "must be a list of 2 numbers"),
        ({}, {"token_embd.weight": floats(1, 2)}, "no matrix 'token_embd.weight'"),
        ({}, {"blk.0.attn_q.weight": ("F32", (12, 16), bytes(768))}, "12 rows, not 4 heads of 4"),
        (
            {"llama.expert_count": 2, "llama.expert_used_count": 1},
            {
                "blk.0.ffn_up_exps.weight": ("F32", (1, 2, 2), bytes(16)),
                "blk.0.ffn_up.0.weight": ("F32", (2, 2), bytes(16)),
            },
            "experts.0.w3.weight twice, by two names",
        ),
    ],
)
def test_what_is_refused(keys, held, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, keys, {**EMBEDDING, **held})
    assert "m.gguf" in str(caught.value)


def test_tensors_without_a_place_are_named(tmp_path):
    held = {**EMBEDDING, "blk.0.attn_k_b.weight": floats(1), "odd": floats(1)}
    with pytest.raises(CheckpointError, match=r"left over.*blk\.0\.attn_k_b\.weight, odd"):
        opened(tmp_path, {}, held).schedule()


TOKENS = ["<|endoftext|>", "a", "<|eot_id|>", "<|im_end|>", "<|end|>"]


@pytest.mark.parametrize(
    "keys, stops",
    [
        ({"tokenizer.ggml.eos_token_id": 1}, (1, 0, 2, 4)),
        ({"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.eom_token_id": 1}, (2, 1, 0, 4)),
        ({"tokenizer.ggml.tokens": ["<|end|>", "b", "<|return|>"]}, (2,)),
        ({"tokenizer.ggml.tokens": ...}, ()),
    ],
)
def test_stop_ids(keys, stops, tmp_path):
    """<|im_end|> is ordinary text here, and counts only as a control token."""
    vocabulary = {"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [3, 1, 3, 1, 3]}
    assert opened(tmp_path, {**vocabulary, **keys}).generation.eos_token_ids == stops


def test_sampling_that_the_file_recommends(tmp_path):
    keys = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.75,
    }
    generation = opened(tmp_path, {**keys, "tokenizer.ggml.bos_token_id": 1}).generation
    assert (generation.temperature, generation.top_k, generation.top_p) == (0.5, 20, 0.75)
    assert generation.bos_token_id == 1
    with pytest.raises(CheckpointError, match="'bos_token_id' is 'x'"):
        opened(tmp_path, {"tokenizer.ggml.bos_token_id": "x"})
