"""One engine over the demo model, and the plain forward that its scores must equal."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.devices import DEVICES
from xlinfer.models.causal_lm import causal_attend
from xlinfer.serve.build import DEMO_MODEL, Built, EngineOptions, build
from xlinfer.weights import load_model

CONTEXT = 96  # tokens: longer texts go by windows
ATOL = 1e-4  # float32 sums in another order, over a few dozen tokens


@pytest.fixture(scope="session")
def built() -> Built:
    options = EngineOptions(
        model=str(DEMO_MODEL), max_num_seqs=8, max_num_batched_tokens=48, max_model_len=CONTEXT,
        dtype="float32",
    )  # fmt: skip
    return build(options, lambda stage, done, total: None)


@pytest.fixture(scope="session")
def plain() -> Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]:
    """(log-probabilities [T, V] of the next token, hidden states [T, D]) by the plain forward."""
    model = load_model(DEMO_MODEL, dtype="float32")
    attend = causal_attend(DEVICES["cpu"], None)

    @nnx.jit
    def forward(model, tokens_BT):
        pos_BT = jnp.arange(CONTEXT)[None]
        x_BTD, _ = model.hidden(tokens_BT, pos_BT, attend, None, context_len=CONTEXT)
        return jax.nn.log_softmax(model.logits(x_BTD)), x_BTD

    def run(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((1, CONTEXT), np.int32)  # one shape, one compile; the model is causal
        padded[0, : len(tokens)] = tokens
        logprobs_BTV, x_BTD = forward(model, jnp.asarray(padded))
        return np.asarray(logprobs_BTV)[0, : len(tokens)], np.asarray(x_BTD)[0, : len(tokens)]

    return run


@pytest.fixture(scope="session")
def scores(plain) -> Callable[[Sequence[int], int], tuple[list[float], bool]]:
    """Log-probabilities of the tokens from a position on, and whether each is the likeliest."""

    def run(tokens: Sequence[int], start: int) -> tuple[list[float], bool]:
        logprobs_TV, _ = plain(tokens)
        told = [float(logprobs_TV[i - 1, tokens[i]]) for i in range(start, len(tokens))]
        best = [int(logprobs_TV[i - 1].argmax()) for i in range(start, len(tokens))]
        return told, best == list(tokens[start:])

    return run
