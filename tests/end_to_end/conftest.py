"""One real engine over the demo model, for every test here that does not start a process.

Only one thread may call it: the HTTP tests hold it while their server runs, the library's
tests before or after.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlinfer.engine.engine import Engine
from xlinfer.serve.build import DEMO_MODEL, Built, EngineOptions, build
from xlinfer.serve.tokenizer import Tokenizer
from xlinfer.weights import load_model

MAX_MODEL_LEN = 256
MAX_NUM_SEQS = 16
HELDOUT = Path(__file__).parents[1] / "data" / "heldout.txt"

Reference = Callable[[Sequence[int]], np.ndarray]


@pytest.fixture(scope="session")
def built() -> Built:
    options = EngineOptions(
        model=str(DEMO_MODEL),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=64,
        max_model_len=MAX_MODEL_LEN,
    )
    return build(options, lambda stage, done, total: None)


@pytest.fixture(scope="session")
def engine(built) -> Engine:
    assert isinstance(built.engine, Engine)
    return built.engine


@pytest.fixture(scope="session")
def tokenizer(built) -> Tokenizer:
    return built.tokenizer


@pytest.fixture(scope="session")
def heldout() -> str:
    return HELDOUT.read_text()


@pytest.fixture(scope="session")
def reference() -> Reference:
    """[len(ids), vocab] log-probabilities of the next token by the plain forward, no cache."""
    model = load_model(DEMO_MODEL)
    score = nnx.jit(lambda model, ids_BT: jax.nn.log_softmax(model(ids_BT)))

    def logprobs(ids: Sequence[int]) -> np.ndarray:
        padded = [*ids, *[0] * (64 - len(ids))]  # one shape, so one compile; the model is causal
        return np.asarray(score(model, jnp.asarray([padded], jnp.int32)))[0, : len(ids)]

    return logprobs
