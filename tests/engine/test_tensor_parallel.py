"""The engine gives transformers' tokens and log-probabilities, for each family and on one, two and
four devices."""

import itertools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import FAMILIES, GOLDENS
from xlinfer.engine.engine import Engine
from xlinfer.engine.worker import Worker
from xlinfer.mesh import make_mesh
from xlinfer.request import Request, SamplingParams
from xlinfer.weights import load_model

# Partial sums are added in another order on each number of devices: float32, logits of size 10.
ATOL = 1e-4
DEVICE_COUNTS = (1, 2, 4)


# The others differ in what the forward's own tests show, on as many devices.
QUICK = {
    *itertools.product(("gemma3", "gpt-oss"), (1,)),
    ("llama", 2),
    *itertools.product(("qwen3-moe", "deepseek-v3"), (4,)),
}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(FAMILIES, DEVICE_COUNTS)
]


@pytest.mark.parametrize("family, devices", CASES)  # with 4 the two kv heads are replicated
def test_tokens_and_log_probabilities(family, devices):
    golden = load_file(GOLDENS / family / "golden.safetensors")
    prompts, want = golden["input_ids"].tolist(), golden["greedy"].tolist()
    mesh = make_mesh(devices)
    model = load_model(GOLDENS / family, mesh=mesh)
    engine = Engine(
        model, mesh=mesh, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64, page_size=4
    )
    greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=0, prompt_logprobs=0)
    for i, prompt in enumerate(prompts):
        engine.add_request(
            Request(request_id=str(i), prompt_token_ids=tuple(prompt), sampling=greedy)
        )
    tokens, scores = {"0": [], "1": []}, {}
    while engine.has_work:
        for out in engine.step():
            tokens[out.request_id] += out.token_ids
            if out.prompt_logprobs:
                scores[out.request_id] = [e.logprobs[0] for e in out.prompt_logprobs if e]
        engine.check()
    assert [tokens["0"], tokens["1"]] == want

    logits = golden["logits"].astype(np.float64)
    all_logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, prompt in enumerate(prompts):
        expected = all_logprobs[i, np.arange(31), prompt[1:]]
        np.testing.assert_allclose(scores[str(i)], expected, atol=ATOL)

    assert isinstance(engine._executor, Worker)
    kv = jax.tree.leaves(engine._executor._kv)[0]
    if model.latents is None:
        assert kv.sharding.shard_shape(kv.shape)[2] == kv.shape[2] // devices, "the cache is split"
        return
    assert kv.sharding.is_fully_replicated
    first, *others = (np.asarray(shard.data) for shard in kv.addressable_shards)
    assert first.any() and len(others) == devices - 1
    for copy in others:  # each device wrote its own
        np.testing.assert_array_equal(copy, first)
