"""Replicas answer as one engine does, each from its own devices."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.stages import Lowered

import xlinfer
from tests.checkpoints import GOLDENS
from xlinfer.compile import SINGLE
from xlinfer.engine.engine import Engine
from xlinfer.mesh import make_mesh
from xlinfer.request import InvalidRequest, Request, SamplingParams
from xlinfer.serve.build import DEMO_MODEL
from xlinfer.weights import load_model, replica

SIZES: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 64,
    "page_size": 4,
}
PROMPTS = [{"prompt_token_ids": [(7 * i + j) % 200 + 3 for j in range(5 + i)]} for i in range(12)]
SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=8, ignore_eos=True)


def tokens(llm: xlinfer.LLM) -> list[list[int]]:
    answers = llm.generate(PROMPTS, SAMPLED, use_tqdm=False)
    llm.engine.check()
    return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    return tokens(xlinfer.LLM(DEMO_MODEL, **SIZES))


@pytest.fixture(scope="module")
def four() -> Iterator[xlinfer.LLM]:
    with mock.patch.object(Lowered, "compile", autospec=True, side_effect=Lowered.compile) as calls:
        llm = xlinfer.LLM(DEMO_MODEL, data_parallel_size=4, **SIZES)
    plan = llm.engine.plan
    each = len(plan.token_buckets) + len(plan.decode_buckets)
    assert calls.call_count == each + len(SINGLE), "what one replica compiled runs on all"
    yield llm


def devices_of(engine) -> set:
    return set().union(*(x.sharding.device_set for x in engine._executor.params))


def test_four_replicas_give_the_tokens_of_one(alone, four):
    assert tokens(four) == alone
    engines = four.engine.engines
    assert len(set().union(*map(devices_of, engines))) == 4
    assert all(engine.stats().generation_tokens > 0 for engine in engines), "each took part"
    assert four.engine.stats().generation_tokens == 12 * 8
    assert four.engine.max_running == 16


def test_experts_and_quantized_matrices_know_their_devices():
    first, second = (make_mesh(2, jax.devices()[i : i + 2]) for i in (0, 2))
    model = load_model(GOLDENS / "qwen3-moe", mesh=first, quantization="int8")
    engines = [Engine(m, **SIZES) for m in (model, replica(model, second))]
    assert devices_of(engines[1]) == set(jax.devices()[2:4])
    one = Request(request_id="x", prompt_token_ids=tuple(range(3, 20)), sampling=SAMPLED)
    answers = []
    for engine in engines:
        engine.add_request(one)
        answers.append([])
        while engine.has_work:
            answers[-1] += [token for out in engine.step() for token in out.token_ids]
    assert len(answers[0]) == 8 and answers[0] == answers[1]


def test_an_id_is_in_use_and_an_aborted_one_is_free_again(four):
    engine = four.engine
    one = Request(request_id="x", prompt_token_ids=(5, 6, 7), sampling=SAMPLED)
    engine.add_request(one)
    with pytest.raises(InvalidRequest, match="'x' is in use"):
        engine.add_request(one)
    engine.step()
    engine.abort(["x", "unknown"])
    while engine.has_work:
        assert not engine.step()
    engine.add_request(one)
    answer = []
    while engine.has_work:
        answer += [token for out in engine.step() for token in out.token_ids]
    assert len(answer) == 8
    engine.check()


def test_a_refused_request_leaves_nothing_behind(four):
    empty = Request(request_id="empty", prompt_token_ids=(), sampling=SAMPLED)
    with pytest.raises(InvalidRequest):
        four.engine.add_request(empty)
    assert not four.engine.has_work and not any(four.engine._placement.load)


def test_a_shared_prefix_is_computed_once(four):
    shared = list(range(900, 932))
    prompts = [{"prompt_token_ids": [*shared, 40 + i]} for i in range(4)]
    before = four.engine.stats().prefix_cache_hits
    for prompt in prompts:
        four.generate(prompt, SAMPLED, use_tqdm=False)
    assert four.engine.stats().prefix_cache_hits - before == 3 * 32


def test_new_weights_reach_every_replica(four, alone):
    model = load_model(DEMO_MODEL)
    four.engine.update_weights(jax.tree.map(jnp.zeros_like, nnx.state(model)))
    assert all(not np.asarray(p).any() for e in four.engine.engines for p in e._executor.params)
    four.engine.update_weights(nnx.state(model))
    assert tokens(four) == alone


def test_more_replicas_than_devices_are_refused():
    with pytest.raises(ValueError, match="data_parallel_size is 3: of 4 devices with 2 for each"):
        xlinfer.LLM(DEMO_MODEL, data_parallel_size=3, tensor_parallel_size=2, **SIZES)
