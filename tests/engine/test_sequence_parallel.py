"""Devices that share a step's tokens give transformers' tokens and log-probabilities."""

import itertools

import pytest
from safetensors.numpy import load_file

from tests.checkpoints import GOLDENS
from tests.engine.golden_answers import check_answers
from xlinfer.engine.engine import Engine
from xlinfer.mesh import make_mesh
from xlinfer.plan import PlanError
from xlinfer.weights import load_model

ATOL = 1e-4  # as of tensor parallel meshes: sums are made in another order
# Each with the devices that share a layer, and how many of them have experts of their own.
CASES = [
    ("llama", (2, 1)),
    pytest.param("deepseek-v3", (2, 2), marks=pytest.mark.slow),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(
            ("gemma2", "gemma3", "gpt-oss", "bloom", "mistral-window", "qwen3-moe", "olmo2"),
            [(1, 1), (2, 1)],
        )
    ),
]


def engine_of(family, devices, own_experts, **sizes) -> Engine:
    mesh = make_mesh(devices, expert_parallel_size=own_experts, sequence_parallel_size=2)
    model = load_model(GOLDENS / family, mesh=mesh)
    return Engine(model, mesh=mesh, max_num_seqs=2, max_model_len=64, page_size=4, **sizes)


@pytest.mark.parametrize("family, shared", CASES)
def test_tokens_and_log_probabilities(family, shared):
    golden = load_file(GOLDENS / family / "golden.safetensors")
    # A prompt ends within a part of a step, and goes on in the next step.
    engine = engine_of(family, *shared, max_num_batched_tokens=24)
    check_answers(engine, golden, atol=ATOL)


def test_steps_that_do_not_divide_are_refused():
    with pytest.raises(
        PlanError, match=r"sequence_parallel_size=2 does not divide steps of 33 tok"
    ):
        engine_of("llama", 1, 1, max_num_batched_tokens=33)


def test_encoder_decoders_are_refused():
    with pytest.raises(ValueError, match=r"sequence_parallel_size 2: .*encoder-decoder"):
        engine_of("t5", 1, 1)
