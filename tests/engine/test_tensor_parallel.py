"""The engine gives transformers' tokens and log-probabilities, for each family and on one, two and
four devices."""

import itertools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import FAMILIES, GOLDENS
from tests.engine.golden_answers import check_answers
from xlinfer.engine.engine import Engine
from xlinfer.engine.worker import Worker
from xlinfer.mesh import make_mesh
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
    mesh = make_mesh(devices)
    model = load_model(GOLDENS / family, mesh=mesh)
    engine = Engine(
        model, mesh=mesh, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=64, page_size=4
    )
    check_answers(engine, golden, atol=ATOL)

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
