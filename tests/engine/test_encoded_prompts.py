"""Encoder-decoder models in the engine: the prompt is read once, its answers are transformers'."""

import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from converters import open_checkpoint
from pallas_kernels.devices import DEVICES
from tests.checkpoints import ENCODER_DECODERS, GOLDENS
from tests.engine.test_engine import GREEDY, run
from xlinfer.deployment import Sizes, deploy, facts_of
from xlinfer.engine.engine import Engine
from xlinfer.engine.worker import Worker
from xlinfer.mesh import make_mesh
from xlinfer.models import EncoderDecoder
from xlinfer.request import InvalidRequest, Request, SamplingParams
from xlinfer.weights import load_model

ROOMY: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64}


def start_of(name: str) -> tuple[int, ...]:
    return open_checkpoint(GOLDENS / name).generation.decoder_start_token_ids


def request(number, name, prompt, sampling=GREEDY, **fields) -> Request:
    return Request(
        request_id=str(number), prompt_token_ids=start_of(name),
        encoder_token_ids=tuple(map(int, prompt)), sampling=sampling, **fields,
    )  # fmt: skip


def random_prompts(count, seed=0, longest=60):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 160, rng.integers(1, longest)) for _ in range(count)]


def naive(model, name, prompt, count: int) -> list[int]:
    """The most likely token each time, by the whole forward, without a cache."""
    start = list(start_of(name))
    tokens = np.zeros((1, len(start) + count), np.int32)
    tokens[0, : len(start)] = start
    inputs = np.zeros((1, 64), np.int32)
    inputs[0, : len(prompt)] = prompt
    for t in range(len(start), tokens.shape[1]):
        logits = forward(model, inputs, tokens, np.array([len(prompt)], np.int32))
        tokens[0, t] = np.argmax(logits[0, t - 1])
    return tokens[0, len(start) :].tolist()


@jax.jit
def forward(model, inputs, tokens, lengths):
    return model(inputs, tokens, lengths)


QUICK = (("bart", 1), ("t5-untied", 2))
CASES = itertools.product(ENCODER_DECODERS, (1, 2))


@pytest.mark.parametrize(
    "name, devices",
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_greedy_equals_transformers(name, devices):
    golden = load_file(GOLDENS / name / "golden.safetensors")
    prompts, want = golden["input_ids"], golden["greedy"].tolist()
    mesh = make_mesh(devices)
    engine = Engine(load_model(GOLDENS / name, mesh=mesh), mesh=mesh, **ROOMY)
    assert run(engine, [request(0, name, prompts[0])])["0"].token_ids == want[0]  # alone
    others = [request(f"other{i}", name, p) for i, p in enumerate(random_prompts(9))]
    got = run(engine, [request(0, name, prompts[0]), *others, request(1, name, prompts[1])])
    assert [got["0"].token_ids, got["1"].token_ids] == want
    assert got["0"].num_cached_tokens == 0


@pytest.mark.parametrize("name", [pytest.param("t5-untied", marks=pytest.mark.slow), "bart"])
def test_prompts_of_all_lengths_with_few_pages(name):
    """Pages of 4 and fewer than the sequences want: they are preempted, and encoded again."""
    model, prompts = load_model(GOLDENS / name), random_prompts(7, seed=3)
    prompts += [np.array([5]), np.arange(3, 67)]  # one token; as many as there may be
    engine = Engine(
        model, max_num_seqs=4, max_num_batched_tokens=4, page_size=4, num_pages=40,
        max_model_len=64,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=30)
    got = run(engine, [request(i, name, p, sampling) for i, p in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert got[str(i)].token_ids == naive(model, name, prompt, 30), len(prompt)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().prompt_tokens == sum(map(len, prompts))
    assert engine.stats().prefix_cache_queries == 0


def test_neighbours_change_no_bits():
    golden = load_file(GOLDENS / "t5" / "golden.safetensors")
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=12, logprobs=3)
    engine = Engine(load_model(GOLDENS / "t5"), **ROOMY, deterministic=True)
    mine = request("mine", "t5", golden["input_ids"][0], sampling)
    alone = run(engine, [mine])["mine"]
    others = [request(i, "t5", p) for i, p in enumerate(random_prompts(12, seed=1))]
    together = run(engine, [*others, mine])["mine"]
    assert (alone.token_ids, alone.logprobs) == (together.token_ids, together.logprobs)


@pytest.mark.slow
def test_the_programs_are_the_plans_and_nothing_compiles_later():
    engine = Engine(load_model(GOLDENS / "bart"), **ROOMY)
    assert engine.plan.encode_buckets == (32, 64)
    assert isinstance(engine._executor, Worker)
    assert set(engine._executor._run.encode) == {32, 64}
    compiles: list[str] = []

    def listener(event: str, duration_secs: float, **_: str | int) -> None:
        compiles.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run(engine, [request(i, "bart", p) for i, p in enumerate(random_prompts(20))])
        assert compiles == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.slow
def test_new_weights_encode_again():
    model, name, prompt = load_model(GOLDENS / "t5-relu"), "t5-relu", random_prompts(1, seed=8)[0]
    engine = Engine(model, **ROOMY)
    engine.add_request(request(0, name, prompt, SamplingParams(temperature=0, max_tokens=60)))
    before = [t for out in engine.step() for t in out.token_ids]
    other = nnx.clone(model)
    assert isinstance(other, EncoderDecoder)
    norm = other.encoder.norm.scale_D
    norm.set_value(jnp.flip(norm.get_value()))
    engine.update_weights(nnx.state(other))
    tokens = before + run(engine, [])["0"].token_ids
    assert tokens[: len(before)] == naive(model, name, prompt, 30)[: len(before)]
    # Those of the steps that were in flight are the old weights', all after them the new ones'.
    inputs = np.zeros((1, 64), np.int32)
    inputs[0, : len(prompt)] = prompt
    all_tokens = np.array([[*start_of(name), *tokens]], np.int32)
    best = {}
    for which, weights in (("old", model), ("new", other)):
        logits = forward(weights, inputs, all_tokens, np.array([len(prompt)], np.int32))
        best[which] = np.argmax(logits[0], -1)[:-1].tolist()
    assert tokens[40:] == best["new"][40:] != best["old"][40:]  # two windows of 16 were in flight


def test_other_requests_are_refused():
    engine = Engine(load_model(GOLDENS / "t5-relu"), **ROOMY)
    sampling = SamplingParams(prompt_logprobs=0)
    for bad, param in (
        (request(0, "t5", np.ones(65)), "prompt"),
        (request(0, "t5", ()), "prompt"),
        (request(0, "t5", (1, 2), sampling), "prompt_logprobs"),
    ):
        with pytest.raises(InvalidRequest) as error:
            engine.add_request(bad)
        assert error.value.param == param
    assert not engine.has_work


@pytest.mark.parametrize(
    "name, device, impl, why",
    [
        ("t5", "h200", "reference", "no bias by distance"),
        ("t5", "v6e", "reference", "no bias by distance"),
        ("bart", "v6e", "reference", "not to others alone"),
        ("bart", "h200", "mosaic_gpu", None),
        ("t5", "cpu", "reference", None),
    ],
)
def test_what_a_kernel_lacks_is_said_once(name, device, impl, why, caplog):
    """Of heads that kernels take, as the published models have them."""
    model = load_model(GOLDENS / name, dtype="bfloat16")
    facts = facts_of(model)._replace(head_dim=64)
    graph, state = nnx.split(model)
    given = {
        "mesh": make_mesh(1), "device": DEVICES[device], "device_bytes": 2**36, "described": True,
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, "xlinfer"):
        deployment = deploy(graph, state, facts, sizes=Sizes(), **given)
    assert deployment.spec.impl == impl
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (why is not None)
    if why is not None:
        assert why in said[0] and "attention runs by the reference" in said[0]
        kernel = {"h200": "mosaic_gpu", "v6e": "mosaic_tpu"}[device]
        with pytest.raises(ValueError, match=f"attention_impl {kernel} does not take.*{why}"):
            deploy(graph, state, facts, sizes=Sizes(attention_impl=kernel), **given)
