"""config.json of Llama 4: what is read, what stands for what is absent, what is refused."""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from converters import CheckpointError, parameter_rules, parse_config, text_document
from converters.inspect import main as inspect
from converters.quantization import KEYS, read_scheme
from tests.checkpoints import GOLDENS, config, opened, write
from tests.converters import packers
from tests.converters.quantized import matrices, of_all
from xlinfer.config import Llama3Rope, MoE, TemperatureTuning
from xlinfer.models.rope import rope_frequencies
from xlinfer.stacks import runs
from xlinfer.weights import load_model


def llama4(**changes: Any) -> dict[str, Any]:
    own = {"intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 1}
    return config("llama4_text", **{"num_hidden_layers": 4, **own, **changes})


def test_what_stands_for_what_is_absent(tmp_path):
    found = opened(tmp_path, llama4(attention_chunk_size=...)).config
    assert [rope is None for rope in found.ropes] == [False, False, False, True]
    assert found.attention_chunk_sizes == (8192, 8192, 8192, None) and found.windows == (None,) * 4
    assert found.temperature_tuning == TemperatureTuning(attn_scale=0.1, floor_scale=8192.0)
    assert found.rope_interleaved and found.qk_norm == "after_rope"
    assert found.intermediate_size == 40
    assert found.moe == MoE(
        layers=(0, 1, 2, 3), num_experts=4, num_experts_per_tok=1, intermediate_size=24,
        scores="sigmoid", selection_bias=False, groups=None, norm_topk_prob=False,
        weight_multiplier=1.0, shared_intermediate_size=24, shared_gate=False, bias=False,
        scaled_inputs=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes, field, want",
    [
        ({"no_rope_layers": []}, "attention_chunk_sizes", (8192, 8192, 8192, None)),
        ({"no_rope_layers": [0, 1, 1, 0]}, "attention_chunk_sizes", (None, 8192, 8192, None)),
        ({"no_rope_layer_interval": 2, "attention_chunk_size": 7}, "attention_chunk_sizes",
         (7, None, 7, None)),
        ({"layer_types": ["full_attention"] * 4, "attention_chunk_size": None},
         "attention_chunk_sizes", (None,) * 4),
        ({"attn_temperature_tuning": 4, "attn_scale": 0.5}, "temperature_tuning",
         TemperatureTuning(attn_scale=0.5, floor_scale=8192.0)),
        ({"attn_temperature_tuning": 0}, "temperature_tuning", None),
        ({"attn_temperature_tuning": False}, "temperature_tuning", None),
        ({"use_qk_norm": False}, "qk_norm", None),
        ({"attention_bias": True}, "qkv_bias", True),
        ({"moe_layers": [], "interleave_moe_layer_step": 0}, "moe", None),
        ({"for_llm_compressor": False, "router_jitter_noise": 0.0}, "sinks", False),
    ],
)  # fmt: skip
def test_what_a_key_says(changes, field, want, tmp_path):
    assert getattr(opened(tmp_path, llama4(**changes)).config, field) == want


@pytest.mark.parametrize(
    "changes, layers",
    [({"interleave_moe_layer_step": 2}, (1, 3)), ({"moe_layers": [2, 0]}, (0, 2))],
)
def test_which_layers_have_experts(changes, layers, tmp_path):
    found = opened(tmp_path, llama4(**changes)).config
    assert found.moe is not None and found.moe.layers == layers


def test_a_rope_whose_ramp_has_no_width(tmp_path):
    """Scout's, with both factors 1."""
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "low_freq_factor": 1.0,
        "high_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    found = opened(tmp_path, llama4(rope_parameters=rope)).config.ropes[0]
    assert isinstance(found, Llama3Rope)
    freq_h, _ = rope_frequencies(found, 128, 8192)
    plain_h = 5e5 ** -(np.arange(0, 128, 2) / 128)
    want_h = np.where(2 * np.pi / plain_h > 8192, plain_h / 16, plain_h)
    np.testing.assert_allclose(freq_h, want_h, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"no_rope_layers": [1, 0]}, "'no_rope_layers' must be null or 4 of 0 and 1"),
        ({"attention_chunk_size": None}, "'attention_chunk_size' is null"),
        ({"attention_chunk_size": 0}, "'attention_chunk_size' is 0"),
        ({"layer_types": ["sliding_attention"] * 4}, "full_attention or chunked_attention"),
        (
            {"moe_layers": [4]},
            r"'moe_layers' is \[4\]; it must be null or a list of layers, 0 to 3",
        ),
        ({"moe_layers": "all"}, "'moe_layers' is 'all'"),
        ({"interleave_moe_layer_step": 0}, "'interleave_moe_layer_step' is 0"),
        ({"intermediate_size_mlp": ...}, "'intermediate_size_mlp' is missing"),
        ({"num_local_experts": ...}, "'num_experts' is missing"),
        ({"attn_temperature_tuning": "yes"}, "'attn_temperature_tuning' is 'yes'"),
        ({"floor_scale": 0}, "'floor_scale' is 0"),
        ({"sliding_window": 4}, "unknown model constant 'sliding_window'"),
    ],
)
def test_what_is_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, llama4(**changes))


SCOUT = {"model_type": "llama4", "text_config": {
    "model_type": "llama4_text", "max_position_embeddings": 10_485_760, "no_rope_layers": [],
    "rope_theta": 500_000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}}  # fmt: skip
MAVERICK = {"model_type": "llama4", "text_config": {
    "model_type": "llama4_text", "max_position_embeddings": 1_048_576, "rope_theta": 500_000.0,
    "num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False,
}}  # fmt: skip


@pytest.mark.parametrize("document, billions", [(SCOUT, 107.8), (MAVERICK, 400.7)])
def test_the_published_sizes(document, billions, tmp_path):
    """Those of the text models, of configs that say only what differs from their class."""
    found = parse_config(tmp_path, text_document(tmp_path, document))
    numbers = sum(math.prod(rule.shape) for rule in parameter_rules(found))
    assert round(numbers / 1e9, 1) == billions
    assert [(run.period, run.repeats) for run in runs(found.kinds)] == [(4, 12)]


def test_chunks_are_said_by_layer(capsys):
    assert inspect(["inspect", str(GOLDENS / "llama4")]) == 0
    said = capsys.readouterr().out
    assert "chunks      layers 0, 2: 12; layers 1, 3: none" in said
    assert "temperature_tuning (attn_scale 0.8, floor_scale 6.0)" in said


ATOL = 2e-4  # float32, logits of a few units: packed products sum in another order
QUANTIZED = {
    "gptq": partial(packers.gptq, bits=4, group=32, symmetric=True, version="v1"),
    "awq": partial(packers.awq, group=32, version="gemm"),
    "compressed-tensors": partial(packers.packed_ints, bits=4, group=32, symmetric=True),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "gptq" else pytest.param(n, marks=pytest.mark.slow) for n in QUANTIZED],
)
def test_a_quantized_one_has_a_tensor_for_each_expert(name, tmp_path):
    """And computes what its dequantized weights do, fused as float checkpoints have them."""
    cfg = llama4(
        hidden_size=64, intermediate_size=32, intermediate_size_mlp=64, head_dim=16,
        attention_chunk_size=8, num_hidden_layers=2, interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
    )  # fmt: skip
    rng, held = np.random.default_rng(0), {}
    scheme = read_scheme("config.json", {KEYS[0]: QUANTIZED[name](rng, 64, 64).config})
    for rule in parameter_rules(parse_config(tmp_path, cfg), scheme=scheme):
        held |= {
            source: rng.normal(0, 0.3, rule.source_shape).astype(np.float32)
            for source in rule.sources
        }
    modules = matrices(held)
    packed, floats, said = of_all(QUANTIZED[name], rng, held, modules)
    smaller = lambda x: (x / 64).astype(x.dtype)  # else softmax has one winner, and errors grow
    packed |= {n: smaller(x) for n, x in packed.items() if n.endswith(("scales", "_scale"))}
    floats |= {f"{module}.weight": smaller(floats[f"{module}.weight"]) for module in modules}
    experts = "model.layers.1.feed_forward.experts"
    taken = [n for n in floats if n.startswith(experts)]
    apart = {n.removeprefix(f"{experts}."): floats.pop(n).T for n in taken}
    of = lambda part: np.stack([apart[f"{e}.{part}_proj.weight"] for e in range(4)])
    floats[f"{experts}.gate_up_proj"] = np.concatenate([of("gate"), of("up")], axis=-1)
    floats[f"{experts}.down_proj"] = np.ascontiguousarray(of("down"))
    got = write(tmp_path / "packed", {**cfg, "quantization_config": said}, packed)
    want = write(tmp_path / "floats", cfg, floats)
    tokens = jnp.arange(20)[None]
    got_BTV, want_BTV = (load_model(f, dtype=np.dtype("float32"))(tokens) for f in (got, want))
    assert jnp.abs(got_BTV - want_BTV).max() < ATOL
