"""What a prompt's hidden states tell, log-probabilities and embeddings, by the engine against the
plain forward: in chunks, after preemptions, with prefixes found, beside answers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.devices import DEVICES
from tests.checkpoints import GOLDENS
from tests.engine.test_engine import drain, run
from xlinfer.engine.engine import Engine
from xlinfer.models.causal_lm import causal_attend
from xlinfer.request import InvalidRequest, Request, SamplingParams, TokenOutput
from xlinfer.weights import load_model

ATOL = 1e-4  # a float32 full forward adds in another order
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDENS / "llama")


@pytest.fixture(scope="module")
def tight(model):
    """Pages of 4 tokens, steps of 8, and too few pages for all: whoever comes last gives way."""
    return Engine(
        model, max_num_seqs=4, max_num_batched_tokens=8, page_size=4, num_pages=16,
        max_model_len=48, deterministic=True,
    )  # fmt: skip


def tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 160, count).tolist())


def scored(name, prompt, start, **fields) -> Request:
    fields = {"sampling": SCORED, **fields}
    return Request(request_id=str(name), prompt_token_ids=tuple(prompt), score_from=start, **fields)


def logprobs(out: TokenOutput) -> list[float]:
    return [entry.logprobs[0] for entry in out.prompt_logprobs or () if entry]


@pytest.fixture(scope="module")
def full(model):
    """Log-probabilities of each token after the first, by the plain forward."""
    plain = nnx.jit(lambda model, tokens_BT: model(tokens_BT))

    def forward(prompt: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, 48), np.int32)  # one shape, one compile; the model is causal
        padded[0, : len(prompt)] = prompt
        logits_TV = np.asarray(plain(model, jnp.asarray(padded)))[0, : len(prompt) - 1].astype(
            np.float64
        )
        lse_T = np.log(np.exp(logits_TV).sum(-1))
        return logits_TV[np.arange(len(prompt) - 1), prompt[1:]] - lse_T

    return forward


def test_a_cached_prefix_changes_no_bit(tight, full):
    """Contexts of every length around a page's end, first without anything cached."""
    context = tokens(0, 20)
    for length in (1, 3, 4, 5, 8, 9, 17, 20):
        tight.reset_prefix_cache()
        prompt = context[:length] + tokens(length, 5)
        fresh = run(tight, [scored("fresh", prompt, length)])["fresh"]
        again = run(tight, [scored("again", prompt, length)])["again"]
        assert (fresh.num_cached_tokens, again.num_cached_tokens) == (0, (length - 1) // 4 * 4)
        assert fresh.prompt_logprobs == again.prompt_logprobs
        np.testing.assert_allclose(logprobs(fresh), full(prompt)[length - 1 :], atol=ATOL)


def test_only_what_is_asked_for_is_told(tight):
    prompt = tokens(1, 12)
    whole = run(tight, [scored("a", prompt, 0)])["a"].prompt_logprobs
    assert whole is not None and whole[0] is None and len(whole) == 12
    for start in range(1, 12):
        assert run(tight, [scored("a", prompt, start)])["a"].prompt_logprobs == whole[start:]


def test_scores_among_answers_and_preemptions(tight, full):
    """Every score once and the same bits, whoever gave way meanwhile."""
    shared = tokens(2, 13)
    prompts = {str(i): shared[: 13 - i % 3] + tokens(i, 4 + i % 5) for i in range(12)}
    starts = {name: len(prompt) - 3 - int(name) % 2 for name, prompt in prompts.items()}
    alone = {}
    for name, prompt in prompts.items():
        tight.reset_prefix_cache()
        alone |= run(tight, [scored(name, prompt, starts[name])])
    answers = [
        Request(request_id=f"a{i}", prompt_token_ids=tokens(50 + i, 9), sampling=GREEDY)
        for i in range(6)
    ]
    both = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0)
    mixed = [
        scored(name, prompt, starts[name], sampling=both if int(name) % 4 == 0 else SCORED,
               priority=int(name) % 2)
        for name, prompt in prompts.items()
    ]  # fmt: skip
    before = tight.stats().num_preemptions
    got = run(tight, [*mixed[:4], *answers, *mixed[4:]])
    assert tight.stats().num_preemptions > before
    for name in prompts:
        assert got[name].prompt_logprobs == alone[name].prompt_logprobs
        want = full(prompts[name])[starts[name] - 1 :]
        np.testing.assert_allclose(logprobs(got[name]), want, atol=ATOL)
    assert not tight._outputs._prompt_logprobs, "scores that nobody will hear of are kept"


def test_new_weights_score_the_whole_prompt(tight, model):
    """Half of a score by old weights and half by new ones would be nobody's."""
    prompt, state = tokens(3, 40), nnx.state(model)
    want = run(tight, [scored("a", prompt, 0)])["a"].prompt_logprobs
    tight.update_weights(jax.tree.map(lambda x: x * 0.5, state))
    tight.add_request(scored("b", prompt, 0))
    tight.step()
    tight.update_weights(state)
    assert drain(tight)["b"].prompt_logprobs == want


@pytest.mark.parametrize("start", [-1, 5])
def test_score_from_is_a_position_of_the_prompt(tight, start):
    with pytest.raises(InvalidRequest, match="0 to 4") as error:
        tight.add_request(scored("a", (5, 6, 7, 8, 9), start))
    assert error.value.param == "score_from"


def test_score_from_needs_prompt_logprobs(tight):
    with pytest.raises(InvalidRequest, match="of prompt_logprobs"):
        tight.add_request(scored("a", (5, 6, 7), 1, sampling=GREEDY))


def pooled(name, prompt, how, **fields) -> Request:
    return Request(request_id=str(name), prompt_token_ids=tuple(prompt), pooling=how, **fields)


@pytest.fixture(scope="module")
def hidden(model):
    """The last hidden states of the plain forward, which end with the final norm."""
    attend = causal_attend(DEVICES["cpu"], None)

    @nnx.jit
    def plain(model, tokens_BT):
        pos_BT = jnp.arange(48)[None]
        return model.hidden(tokens_BT, pos_BT, attend, None, context_len=48)[0]

    def forward(prompt: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(prompt)] = prompt
        return np.asarray(plain(model, jnp.asarray(padded)))[0, : len(prompt)]

    return forward


POOLED = {"last": lambda x: x[-1], "mean": lambda x: x.mean(0), "cls": lambda x: x[0]}


@pytest.mark.parametrize("how", POOLED)
def test_embeddings_are_pooled_hidden_states(tight, hidden, how):
    """Of prompts in several chunks, among scores and answers that drive them out."""
    tight.reset_prefix_cache()
    shared = tokens(4, 13)
    prompts = {str(i): (shared + tokens(i, 30))[: 1 + 5 * i] for i in range(9)}
    requests = [pooled(name, prompt, how) for name, prompt in prompts.items()]
    grows = SamplingParams(temperature=0, max_tokens=24)
    others = [scored(f"s{i}", shared + tokens(60 + i, 5), 13, priority=i % 2) for i in range(3)] + [
        Request(request_id=f"a{i}", prompt_token_ids=tokens(i, 8), sampling=grows, priority=-1)
        for i in range(3)
    ]
    before = tight.stats().num_preemptions
    got = run(tight, [*others, *requests[::-1]])
    assert tight.stats().num_preemptions > before
    for name, prompt in prompts.items():
        out = got[name]
        assert (out.token_ids, out.finish_reason, out.prompt_logprobs) == ([], "length", None)
        assert out.pooled is not None and out.pooled.dtype == np.float32
        np.testing.assert_allclose(out.pooled, POOLED[how](hidden(prompt)), atol=ATOL)
    run(tight, [pooled("a", prompts["8"], how)])
    again = run(tight, [pooled("a", prompts["8"], how)])["a"]
    assert again.num_cached_tokens == (40 if how == "last" else 0)
    assert not tight._outputs._sums


@pytest.mark.parametrize("how", ["max", ""])
def test_an_unknown_pooling_is_refused(tight, how):
    with pytest.raises(InvalidRequest, match="one of last, mean, cls") as error:
        tight.add_request(pooled("a", (5, 6), how))
    assert error.value.param == "pooling"
