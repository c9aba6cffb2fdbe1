"""Rotary frequencies of each kind against the published formulas in float64."""

import math

import jax
import numpy as np
import pytest

from converters.config import Constants
from converters.errors import CheckpointError
from converters.rope import read_rope
from tests.checkpoints import config, llama_logits, tensors, write
from xlinfer.config import YarnRope
from xlinfer.models.rope import rope_frequencies
from xlinfer.weights import load_model

H, THETA, TRAINED = 64, 10_000.0, 2048
RTOL = 2e-6  # float32 holds 6e-8; a handful of operations lie between
ATOL = 5e-5  # logits of a few units, float32 against float64


def base(theta=THETA, H=H):
    return theta ** -(np.arange(0, H, 2) / H)


def dynamic(factor, context_len, H=H, theta=THETA, trained=TRAINED):
    """NTK-aware scaling: the base grows so that the slowest pair covers the longer context."""
    longest = max(context_len, trained)
    stretch = factor * longest / trained - (factor - 1)
    return base(theta * stretch ** (H / (H - 2)), H)


def yarn(factor, trained, beta_fast=32.0, beta_slow=1.0, truncate=True, H=H, theta=THETA):
    """arXiv 2309.00071, section 3.2: by the number r of turns over the trained context."""
    freq = base(theta, H)
    # The paper's ramp is linear in r's pair index: find the index where r equals each beta.
    index = [
        H * math.log(trained / (beta * 2 * math.pi)) / (2 * math.log(theta))
        for beta in (beta_fast, beta_slow)
    ]
    low, high = (math.floor(index[0]), math.ceil(index[1])) if truncate else index
    low, high = max(low, 0), min(high, H - 1)
    ramp = np.clip((np.arange(H // 2) - low) / (high - low), 0, 1)
    return (1 - ramp) * freq + ramp * freq / factor


def llama3(factor, low, high, trained):
    out = []
    for freq in base():
        turns = trained * freq / (2 * math.pi)
        blend = min(max((turns - low) / (high - low), 0), 1)
        out.append((1 - blend) * freq / factor + blend * freq)
    return np.array(out)


SHORT, LONG = 1 + np.arange(H // 2) / 100, 1 + np.arange(H // 2) / 4
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT.tolist(),
    "long_factor": LONG.tolist(),
    "original_max_position_embeddings": 512,
}
CASES = {
    "default": ({"rope_type": "default"}, 4096, base(), 1.0),
    "linear": ({"rope_type": "linear", "factor": 4.0}, 4096, base() / 4, 1.0),
    "dynamic short": ({"rope_type": "dynamic", "factor": 2.0}, 100, base(), 1.0),
    "dynamic long": ({"rope_type": "dynamic", "factor": 2.0}, 8192, dynamic(2.0, 8192), 1.0),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        4096,
        llama3(8.0, 1.0, 4.0, 512),
        1.0,
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        4096,
        yarn(4.0, 512),
        0.1 * math.log(4) + 1,
    ),
    "yarn untruncated": (
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 1024,
            "truncate": False,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 1.25,
        },
        4096,
        yarn(32.0, 1024, 16.0, 2.0, truncate=False),
        1.25,
    ),
    "longrope short": (LONGROPE, 512, base() / SHORT, math.sqrt(1 + math.log(4) / math.log(512))),
    "longrope long": (LONGROPE, 513, base() / LONG, math.sqrt(1 + math.log(4) / math.log(512))),
    "longrope attention": ({**LONGROPE, "attention_factor": 1.3}, 512, base() / SHORT, 1.3),
    "yarn mscale": (
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.4},
        4096,
        yarn(4.0, TRAINED),
        (0.07 * math.log(4) + 1) / (0.14 * math.log(4) + 1),
    ),
}


def read(rope, max_position_embeddings=TRAINED, **top):
    constants = Constants("config.json", {"rope_parameters": rope, **top})
    return read_rope(constants, max_position_embeddings, 10_000.0, H)


@pytest.mark.parametrize("case", CASES)
def test_frequencies(case):
    asked, context_len, want, want_scale = CASES[case]
    rope, _ = read({**asked, "rope_theta": THETA})
    freq_h, scale = rope_frequencies(rope, H, context_len)
    assert freq_h.dtype == np.float32 and freq_h.shape == (H // 2,)
    np.testing.assert_allclose(freq_h, want, rtol=RTOL)
    assert scale == pytest.approx(want_scale, rel=1e-12)


@pytest.mark.parametrize(
    "asked, freq_h, scale",
    [
        ({"rope_type": "linear", "factor": 3.0}, base(1000.0, 8) / 3, 1.0),
        ({"rope_type": "dynamic", "factor": 3.0}, dynamic(3.0, 24, 8, 1000.0, 16), 1.0),
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5},
            yarn(4.0, 16, 4.0, 0.5, H=8, theta=1000.0),
            0.1 * math.log(4) + 1,
        ),
    ],
    ids=["linear", "dynamic", "yarn"],
)
@pytest.mark.parametrize("style", [4, 5])
def test_logits(asked, freq_h, scale, style, tmp_path):
    """T = 24 tokens pass the trained context of 16."""
    cfg = config(max_position_embeddings=16, rope_parameters={**asked, "rope_theta": 1000.0})
    held = tensors(cfg)
    tokens_T = np.random.default_rng(4).integers(0, 64, 24)
    want = llama_logits(cfg, held, tokens_T, freq_h, scale)
    if style == 4:
        old = {**asked, "type": asked["rope_type"]}
        del old["rope_type"]
        cfg = config(
            max_position_embeddings=16, rope_parameters=..., rope_theta=1000.0, rope_scaling=old
        )
    model = load_model(write(tmp_path, cfg, held))
    got = jax.jit(lambda m, t: m(t))(model, tokens_T[None].astype(np.int32))[0]
    np.testing.assert_allclose(got, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "asked, longest",
    [
        ({"rope_type": "default"}, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 1024}, 2048),
    ],
)
def test_longest_context(asked, longest):
    assert read(asked)[1] == longest


def test_yarn_defaults_are_the_papers():
    rope, _ = read({"rope_type": "yarn", "factor": 0.5})
    assert isinstance(rope, YarnRope)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True)
    assert rope.attention_factor == 1.0  # a context that shrinks keeps its scale
    assert rope.original_max_position_embeddings == TRAINED and rope.theta == 10_000.0


@pytest.mark.parametrize(
    "asked, top, message",
    [
        ({"rope_type": "ntk", "factor": 2.0}, {}, "'ntk'"),
        ({"rope_type": "linear"}, {}, "'factor' is missing"),
        ({"rope_type": "linear", "factor": "4"}, {}, "'factor' is '4'"),
        ({"rope_type": "linear", "factor": 4.0, "short_factor": 1}, {}, "'short_factor'"),
        ({"factor": 4.0}, {}, "must name its rope_type"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, {}, "disagree"),
        ({"rope_type": "default", "rope_theta": 1e4}, {"rope_theta": 5e5}, "outside"),
        ({"rope_type": "default", "rope_theta": math.inf}, {}, "rope_theta"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, {}, "partial_rotary_factor"),
        ({"rope_type": "default"}, {"rope_scaling": {"type": "default"}}, "both"),
        ("linear", {}, "must be an object"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.5,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            {},
            "must be at most",
        ),
    ],
)
def test_wrong_ropes_are_refused(asked, top, message):
    with pytest.raises(CheckpointError, match=message):
        read(asked, **top)
