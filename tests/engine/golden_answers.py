"""A golden's two prompts through an engine, against what transformers says of them."""

from collections.abc import Mapping

import numpy as np

from xlinfer.engine.engine import Engine
from xlinfer.request import Request, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=0, prompt_logprobs=0)


def check_answers(engine: Engine, golden: Mapping[str, np.ndarray], *, atol: float) -> None:
    """Greedy tokens are equal, and the prompts' log-probabilities within `atol`."""
    prompts, want = golden["input_ids"].tolist(), golden["greedy"].tolist()
    for i, prompt in enumerate(prompts):
        engine.add_request(
            Request(request_id=str(i), prompt_token_ids=tuple(prompt), sampling=GREEDY)
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
        expected = all_logprobs[i, np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scores[str(i)], expected, atol=atol)
