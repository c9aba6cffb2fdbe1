"""An 8-bit cache against dense attention over keys and values rounded as it rounds them."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.checkpoints import GOLDENS, config, tensors, write
from tests.engine.test_engine import request, run
from xlinfer.engine.engine import Engine
from xlinfer.engine.worker import Worker
from xlinfer.mesh import make_mesh
from xlinfer.request import SamplingParams
from xlinfer.weights import load_model

# Float32 sums in another order; ignoring the rounding or a scale moves them by more than 1e-2.
ATOL = 1e-4
LARGEST = 448.0
TOKENS = 12
SCORED = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0, prompt_logprobs=0)
# Pages of 4 tokens, prompts in pieces of 8.
TIGHT: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "page_size": 4,
    "max_model_len": 64,
}


def rounded(x_BTKH, scale_K):
    """What an e4m3 of x / scale stands for, by numpy's own e4m3."""
    x, scale_K1 = np.asarray(x_BTKH, np.float32), np.asarray(scale_K, np.float32)[:, None]
    return (np.clip(x / scale_K1, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
            .astype(np.float32) * scale_K1)  # fmt: skip


def dense(q_BTNH, k_BTKH, v_BTKH, kv, *, layer, window, scale, attention_chunk_size=None,
          softcap=None, sinks_N=None, alibi_N=None, kv_scales=None):  # fmt: skip
    """An Attend: every token against all before it, k and v rounded."""
    assert attention_chunk_size is None
    assert softcap is None and sinks_N is None and alibi_N is None
    T, N, K = *q_BTNH.shape[1:3], k_BTKH.shape[2]
    scales = [np.ones(K, np.float32)] * 2 if kv_scales is None else kv_scales
    as_kept = lambda x, s_K: jnp.repeat(
        jax.pure_callback(rounded, jax.ShapeDtypeStruct(x.shape, jnp.float32), x, s_K), N // K, 2
    )
    k_BTNH, v_BTNH = as_kept(k_BTKH, scales[0]), as_kept(v_BTKH, scales[1])
    s_BNTt = jnp.einsum("BTNH,BtNH->BNTt", q_BTNH, k_BTNH) * scale
    behind_Tt = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    s_BNTt = jnp.where((behind_Tt >= 0) & (behind_Tt < window), s_BNTt, -jnp.inf)
    return jnp.einsum("BNTt,BtNH->BTNH", jax.nn.softmax(s_BNTt, -1), v_BTNH), kv


def emulated(model, prompt, attend=dense):
    """The greedy tokens after `prompt`, and the log-probability of every token but the first."""

    @jax.jit
    def logprobs(tokens_1T):
        pos_1T = jnp.arange(tokens_1T.shape[1])[None]
        x_1TD, _ = model.hidden(tokens_1T, pos_1T, attend, None, context_len=64)
        return jax.nn.log_softmax(model.logits(x_1TD)[0])

    tokens, size = list(map(int, prompt)), len(prompt) + TOKENS
    for _ in range(TOKENS):  # what follows a token changes nothing before it
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(logprobs(padded)[len(tokens) - 1])))
    scores_TV = np.asarray(logprobs(np.array([tokens], np.int32)))
    return tokens[len(prompt) :], scores_TV[np.arange(size - 1), tokens[1:]]


def answer(engine, prompt, name="a"):
    got = run(engine, [request(name, prompt, SCORED)])[name]
    assert got.prompt_logprobs is not None and got.logprobs is not None
    scored = [*(e for e in got.prompt_logprobs if e), *got.logprobs]
    return got.token_ids, np.array([e.logprobs[0] for e in scored]), got.num_cached_tokens


def same(got, want):
    assert got[0] == want[0]
    np.testing.assert_allclose(got[1], want[1], atol=ATOL)


def prompt_of(length, seed=0, vocab=160):
    return np.random.default_rng(seed).integers(3, vocab, length)


@pytest.fixture(scope="module")
def llama():
    return load_model(GOLDENS / "llama")


@pytest.mark.parametrize("name", ["fp8", pytest.param("fp8_e4m3", marks=pytest.mark.slow)])
def test_tokens_and_log_probabilities_are_those_of_rounded_keys_and_values(llama, name):
    prompt = prompt_of(21)
    engine = Engine(llama, **TIGHT, kv_cache_dtype=name)
    assert engine.kv_cache_dtype == "float8_e4m3fn"
    want = emulated(llama, prompt)
    same(answer(engine, prompt), want)
    again = answer(engine, prompt)  # of pages that are there already
    # Scores of the prompt are computed, so its pages are not reused; without them they are.
    same(again, want)
    unscored = SamplingParams(temperature=0, max_tokens=TOKENS)
    reused = run(engine, [request("hit", prompt, unscored)])["hit"]
    assert reused.num_cached_tokens == 20 and reused.token_ids == want[0]

    exact = answer(Engine(llama, **TIGHT), prompt)
    assert np.abs(exact[1] - want[1]).max() > 100 * ATOL, "rounding does not show"


@pytest.mark.slow
def test_what_is_past_the_largest_number_is_cut(tmp_path):
    cfg = config()
    held = {
        name: x * np.float32(4000 if "v_proj" in name else 1) for name, x in tensors(cfg).items()
    }
    model, prompt = load_model(write(tmp_path, cfg, held)), prompt_of(9, vocab=64)
    got = answer(Engine(model, **TIGHT, kv_cache_dtype="fp8"), prompt)
    assert np.isfinite(got[1]).all()
    same(got, emulated(model, prompt))


@pytest.mark.parametrize(
    "devices", [pytest.param(2, marks=pytest.mark.slow), 4]
)  # with 4 the two kv heads are repeated
def test_devices_keep_their_own_heads(devices):
    mesh, prompt = make_mesh(devices), prompt_of(19, seed=1)
    model = load_model(GOLDENS / "llama", mesh=mesh)
    engine = Engine(model, mesh=mesh, **TIGHT, kv_cache_dtype="fp8")
    same(answer(engine, prompt), emulated(load_model(GOLDENS / "llama"), prompt))
    assert isinstance(engine._executor, Worker)
    kv = jax.tree.leaves(engine._executor._kv)[0]
    assert kv.dtype == jnp.float8_e4m3fn
    assert kv.sharding.shard_shape(kv.shape)[2] == kv.shape[2] // devices


def test_one_line_says_what_runs(llama, caplog):
    with caplog.at_level(logging.INFO, logger="xlinfer.engine"):
        Engine(llama, **TIGHT, num_pages=20, deterministic=True, kv_cache_dtype="fp8")
    assert "attention: reference, KV cache: float8_e4m3fn" in caplog.text


@pytest.mark.parametrize(
    "asked, says",
    [
        ("fp8_e5m2", "kv_cache_dtype is 'fp8_e5m2'; it must be one of auto, fp8, fp8_e4m3, bf"),
        ("bfloat16", "kv_cache_dtype is 'bfloat16', and k and v are float32: .* Ask for auto, flo"),
    ],
)
def test_a_dtype_that_is_not_kept_is_refused(llama, asked, says):
    with pytest.raises(ValueError, match=says):
        Engine(llama, **TIGHT, kv_cache_dtype=asked)


def test_a_kernel_that_does_not_run_here_is_refused_by_name(llama):
    with pytest.raises(ValueError, match="mosaic_gpu"):
        Engine(llama, **TIGHT, kv_cache_dtype="fp8", attention_impl="mosaic_gpu")


# Per layer, for k and for v: far from 1, and from each other.
K_SCALES, V_SCALES = (0.004, 0.3), (0.05, 0.0011)
CT = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    }
}


def scaled(folder, k_scales=K_SCALES, v_scales=V_SCALES, **changes):
    """A checkpoint with those scales in compressed-tensors' names."""
    cfg = config(**CT | changes)
    held = tensors(cfg)
    for layer, (k, v) in enumerate(zip(k_scales, v_scales, strict=True)):
        at = f"model.layers.{layer}.self_attn"
        held |= {f"{at}.k_scale": np.array(k, np.float32).reshape(-1)}
        held |= {f"{at}.v_scale": np.array(v, np.float32).reshape(-1)}
    return write(folder, cfg, held)


def test_the_checkpoints_scales_are_used(tmp_path, caplog):
    model, prompt = load_model(scaled(tmp_path)), prompt_of(21, vocab=64)
    with caplog.at_level(logging.INFO, logger="xlinfer.engine"):
        engine = Engine(model, **TIGHT)  # auto
    assert "KV cache: float8_e4m3fn by the model's scales" in caplog.text
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    want = emulated(model, prompt)
    same(answer(engine, prompt), want)
    hit = run(engine, [request("hit", prompt, SamplingParams(temperature=0, max_tokens=TOKENS))])
    assert hit["hit"].num_cached_tokens == 20 and hit["hit"].token_ids == want[0]

    def unscaled(*arrays, kv_scales, **options):
        return dense(*arrays, kv_scales=None, **options)

    ignored = emulated(model, np.array([*prompt, *want[0]]), unscaled)[1]
    shown = np.abs(ignored[: len(want[1])] - want[1]).max()
    assert shown > 100 * ATOL, "the scales do not show"


@pytest.mark.slow
def test_scales_of_each_head_on_several_devices(tmp_path):
    by_head = np.array([[[[0.004]], [[0.5]]], [[[0.3]], [[0.02]]]])
    folder, prompt = scaled(tmp_path, by_head, by_head[::-1, ::-1]), prompt_of(13, vocab=64)
    model = load_model(folder)
    np.testing.assert_allclose(model.layers[0].attn.k_scale_K[...], by_head[:, :, 0, 0])
    want = emulated(model, prompt)
    same(answer(Engine(model, **TIGHT), prompt), want)
    for devices in (2, 4):  # with 4 the two kv heads are repeated
        mesh = make_mesh(devices)
        same(answer(Engine(load_model(folder, mesh=mesh), mesh=mesh, **TIGHT), prompt), want)


@pytest.mark.slow
def test_a_float_cache_leaves_the_scales_out_and_says_so(tmp_path, caplog):
    prompt = prompt_of(9, vocab=64)
    plain = tensors(cfg := config())
    want = answer(Engine(load_model(write(tmp_path / "plain", cfg, plain)), **TIGHT), prompt)
    engine = Engine(load_model(scaled(tmp_path / "scaled")), **TIGHT, kv_cache_dtype="float32")
    same(answer(engine, prompt), want)
    assert "KV cache is float32: the model's k_scale and v_scale are not used" in caplog.text


def test_without_scales_a_warning_says_that_they_are_1(llama, caplog):
    Engine(llama, **TIGHT, num_pages=20, deterministic=True, kv_cache_dtype="fp8")
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "no k_scale and v_scale: they are 1.0" in record.getMessage()


def dense_latent(q_BTNU, q_BTNJ, latent_BTC, rope_BTJ, k_b_NUC, v_b_NCW, kv, *, layer, scale):
    """A LatentAttend: every token against all before it, latents rounded."""
    one = np.ones(1, np.float32)
    kept = lambda x: jax.pure_callback(
        lambda x: rounded(x[:, :, None], one)[:, :, 0], jax.ShapeDtypeStruct(x.shape, x.dtype), x
    )
    latent_BTC, rope_BTJ, T = kept(latent_BTC), kept(rope_BTJ), latent_BTC.shape[1]
    k_BTNU = jnp.einsum("BTC,NUC->BTNU", latent_BTC, k_b_NUC)
    s_BNTt = jnp.einsum("BTNU,BtNU->BNTt", q_BTNU, k_BTNU)
    s_BNTt = (s_BNTt + jnp.einsum("BTNJ,BtJ->BNTt", q_BTNJ, rope_BTJ)) * scale
    s_BNTt = jnp.where(jnp.tril(jnp.ones((T, T), bool))[None, None], s_BNTt, -jnp.inf)
    v_BTNW = jnp.einsum("BTC,NCW->BTNW", latent_BTC, v_b_NCW)
    return jnp.einsum("BNTt,BtNW->BTNW", jax.nn.softmax(s_BNTt, -1), v_BTNW), kv


@pytest.mark.slow
def test_latents_are_kept_in_8_bits_too():
    model, prompt = load_model(GOLDENS / "deepseek-v2-lite"), prompt_of(13)
    got = answer(Engine(model, **TIGHT, kv_cache_dtype="fp8"), prompt)
    same(got, emulated(model, prompt, dense_latent))


def test_an_encoder_decoder_model_has_none():
    with pytest.raises(ValueError, match="an encoder-decoder model's cache is not kept in 8 bits"):
        Engine(load_model(GOLDENS / "t5"), max_num_seqs=2, kv_cache_dtype="fp8")
