"""The real engine behind the real server, as openai-python and hostile clients meet them."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.end_to_end.conftest import MAX_MODEL_LEN
from tests.serve.fake_engine import RunningServer
from xlinfer.serve.build import DEMO_NAME as MODEL

# The engine's programs and the plain forward add in different orders, in float32.
LOGPROB_ATOL = 1e-4
MESSAGES = [{"role": "user", "content": "Write a function that adds two numbers"}]
JSON = {"content-type": "application/json"}
FIBONACCI = "def fibonacci(n):\n"
# More than a second's work for any machine that runs this, in one request.
ENDLESS = {"prompt": FIBONACCI, "n": 64, "max_tokens": 240, "temperature": 1, "ignore_eos": True}
ENDLESS_TOKENS = 64 * 240


@pytest.fixture(scope="module")
def server(built):
    with RunningServer(
        built.engine,
        built.tokenizer,
        generation=built.generation,
        served_model_names=(MODEL,),
        max_queued_requests=64,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


class Metrics:
    """/metrics at one moment: the sum over labels of the samples of a name."""

    def __init__(self, http: httpx.Client):
        self._sums: dict[str, float] = {}
        for family in text_string_to_metric_families(http.get("/metrics").text):
            for sample in family.samples:
                ended = sample.labels.get("finished_reason")
                for name in (sample.name, *([f"{sample.name}:{ended}"] if ended else [])):
                    self._sums[name] = self._sums.get(name, 0.0) + sample.value

    def __getitem__(self, name: str) -> float:
        return self._sums[f"vllm:{name}"]

    @property
    def idle(self) -> bool:
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(self[name] for name in gauges)


def wait_until(http: httpx.Client, holds) -> Metrics:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if holds(metrics := Metrics(http)):
            return metrics
        time.sleep(0.02)
    raise AssertionError(f"after 10 s: {http.get('/metrics').text}")


def greedy(client, prompt, max_tokens=24, **fields):
    return client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, **fields
    )


def chat(client, **fields):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    return client.chat.completions.create(**{**asked, **fields})


def streamed(chunks) -> dict[int, str]:
    """The text of each choice."""
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            in_chat = chunk.object == "chat.completion.chunk"
            said = choice.delta.content if in_chat else choice.text
            texts[choice.index] = texts.get(choice.index, "") + (said or "")
    return texts


def test_completion_streamed_or_not_with_usage(client, tokenizer):
    whole = greedy(client, FIBONACCI)
    choice, prompt = whole.choices[0], len(tokenizer.encode(FIBONACCI))
    assert len(choice.text) > 24 and choice.finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 24)
    assert whole.usage.total_tokens == prompt + 24
    *body, last = greedy(client, FIBONACCI, stream=True, stream_options={"include_usage": True})
    assert streamed(body) == {0: choice.text}
    assert last.usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )


def test_completion_of_token_ids_and_lists(client, tokenizer):
    prompts = [FIBONACCI, "class Queue:\n", "import os, "]
    alone = [greedy(client, prompt).choices[0].text for prompt in prompts]
    assert len(set(alone)) == 3
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for together in (greedy(client, prompts), greedy(client, ids)):
        assert [choice.text for choice in together.choices] == alone
        assert together.usage.prompt_tokens == sum(map(len, ids))


def test_chat_streamed_or_not_with_usage(client, tokenizer):
    whole = chat(client)
    prompt = f"<|im_start|>user\n{MESSAGES[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt)
    assert whole.usage.prompt_tokens == len(ids)
    said = whole.choices[0].message.content
    assert said and said == greedy(client, ids).choices[0].text
    *body, last = chat(client, stream=True, stream_options={"include_usage": True})
    assert streamed(body) == {0: said}
    assert last.usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("eos", [0, 2])
def test_either_eos_ends_a_chat(client, eos):
    done = chat(client, logit_bias={str(eos): 100}, extra_body={"min_tokens": 4})
    assert done.choices[0].finish_reason == "stop" and done.choices[0].stop_reason is None
    assert done.usage.completion_tokens == 5  # the token that ended it is counted, and not said
    assert done.choices[0].message.content and "<|" not in done.choices[0].message.content


def test_logprobs_are_the_models(client, tokenizer, reference):
    ids = tokenizer.encode(FIBONACCI)
    asked = {"logprobs": 3, "extra_body": {"return_token_ids": True}}
    choice = greedy(client, ids, 12, **asked).choices[0]
    want = reference([*ids, *choice.token_ids])[len(ids) - 1 : -1]
    chosen = want[np.arange(12), choice.token_ids]
    np.testing.assert_allclose(choice.logprobs.token_logprobs, chosen, atol=LOGPROB_ATOL, rtol=0)
    for top, row in zip(choice.logprobs.top_logprobs, want, strict=True):
        np.testing.assert_allclose(
            list(top.values()), np.sort(row)[: -len(top) - 1 : -1], atol=LOGPROB_ATOL, rtol=0
        )
    content = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    assert all(len(entry.top_logprobs) == 2 for entry in content)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scores_as_lm_evaluation_harness_asks_for_them(
    http, tokenizer, heldout, reference, max_tokens
):
    prompts = [tokenizer.encode(heldout[at : at + 120])[:length] for at, length in
               ((0, 33), (500, 2), (900, 17))]  # fmt: skip
    body = {"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": max_tokens}
    body |= {"logprobs": 1, "seed": 1234, "echo": True}
    answer = http.post("/v1/completions", json=body).json()
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        scores = choice["logprobs"]["token_logprobs"]
        assert scores[0] is None and len(scores) == len(prompt) + max_tokens
        want = reference(prompt)[np.arange(len(prompt) - 1), prompt[1:]]
        got = scores[1 : len(prompt)]
        np.testing.assert_allclose(got, want, atol=LOGPROB_ATOL, rtol=0)
        best = reference(prompt)[:-1].max(-1)
        tops = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1 : len(prompt)]]
        np.testing.assert_allclose(tops, best, atol=LOGPROB_ATOL, rtol=0)
    assert answer["usage"]["completion_tokens"] == 3 * max_tokens


def test_answers_differ_and_a_seed_brings_them_back(client):
    asked = {"model": MODEL, "prompt": FIBONACCI, "n": 2, "max_tokens": 16, "temperature": 1}
    first, again, other = (client.completions.create(**asked, seed=s) for s in (7, 7, 8))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts) | {choice.text for choice in other.choices}) == 4
    assert [choice.text for choice in again.choices] == texts
    assert streamed(client.completions.create(**asked, seed=7, stream=True)) == dict(
        enumerate(texts)
    )


def test_a_stop_string_across_tokens(client, tokenizer):
    asked = {"extra_body": {"return_token_ids": True}}
    choice = greedy(client, FIBONACCI, 40, **asked).choices[0]
    pieces = [tokenizer.decode([id]) for id in choice.token_ids]
    assert "".join(pieces) == choice.text
    spans = (pieces[n][-1:] + pieces[n + 1][:2] for n in range(8, 39))
    stop = next(s for s in spans if len(s) == 3 and s not in pieces)
    want = choice.text[: choice.text.index(stop)]
    stopped = greedy(client, FIBONACCI, 40, stop=[stop])
    assert stopped.choices[0].text == want and stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].stop_reason == stop
    assert streamed(greedy(client, FIBONACCI, 40, stop=stop, stream=True)) == {0: want}


def test_sixty_four_streams_say_what_each_says_alone(server, client, heldout):
    prompts = [heldout[at * 600 : at * 600 + 8 + 3 * at] for at in range(64)]
    sizes = [6 + number % 9 for number in range(64)]
    alone = [
        greedy(client, p, size).choices[0].text for p, size in zip(prompts, sizes, strict=True)
    ]
    assert len(set(alone)) > 50

    async def one(client: openai.AsyncOpenAI, prompt: str, size: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=size, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(map(one, [client] * 64, prompts, sizes)))

    assert asyncio.run(all_of_them()) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_killed_client_frees_its_pages(server, http, engine, stream):
    before = wait_until(http, lambda metrics: metrics.idle)
    body = json.dumps({**ENDLESS, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        if stream:
            with client.makefile("rb") as lines:
                assert any(line.startswith(b"data: {") for line in lines)
        running = wait_until(http, lambda metrics: metrics["num_requests_running"] > 0)
        assert running["kv_cache_usage_perc"] > 0
    after = wait_until(http, lambda metrics: metrics.idle)
    gained = after["generation_tokens_total"] - before["generation_tokens_total"]
    assert 0 < gained < ENDLESS_TOKENS / 4, "it went on without its reader"
    aborted = "request_success_total:abort"
    assert after[aborted] - before[aborted] == 64
    engine.check()


def test_a_full_queue_says_when_to_come_back(client, http):
    stream = client.completions.create(
        model=MODEL, prompt=FIBONACCI, n=64, max_tokens=200, stream=True, temperature=1
    )
    with stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="queue is full") as caught:
            greedy(client, ["a"] * 33)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    wait_until(http, lambda metrics: metrics.idle)
    assert len(greedy(client, ["a"] * 33, 1).choices) == 33


POISON = [
    {"prompt": [1, 4096]},
    {"prompt": [-1]},
    {"prompt": "x", "logit_bias": {"4096": 1}},
    {"prompt": "x", "stop_token_ids": [4096]},
    {"prompt": "x", "allowed_token_ids": [5000]},
    {"prompt": "x", "stop": ["s"] * 10_000},
    {"prompt": "x", "temperature": float("nan")},
    {"prompt": "x", "max_tokens": 0},
    {"prompt": "x", "logprobs": 4096},
    {"prompt": "x", "bad_words": ["\n"]},
    {"prompt": ["fine", ""]},
    {"prompt": "x " * 100_000},
]
# Served, and unusual enough to disturb a careless sampler.
STRANGE = [
    {"prompt": "x", "temperature": 1e-4, "repetition_penalty": 1e-4, "seed": -(2**63)},
    {"prompt": "x", "temperature": 1e4, "top_p": 1e-9, "seed": 2**63 - 1},
    {"prompt": "x", "allowed_token_ids": [7], "logit_bias": {"7": -100}},
    {"prompt": "x", "bad_words": ["x", " y"], "min_p": 1.0, "logprobs": 20},
    {"prompt": [0], "min_tokens": 8, "stop_token_ids": [202], "presence_penalty": 2},
]


def test_poison_does_not_disturb_neighbours(client, http, heldout):
    prompts = [heldout[at * 700 : at * 700 + 60] for at in range(8)]
    asked = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
    alone = {n: greedy(client, prompt, **asked).choices[0].text for n, prompt in enumerate(prompts)}
    stream = greedy(client, prompts, stream=True, **asked)
    chunks = iter(stream)
    first = next(chunks)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(lambda: streamed([first, *chunks]))
        statuses = {400: POISON, 200: STRANGE}
        while True:
            for status, fields in ((s, fields) for s in statuses for fields in statuses[s]):
                # The standard library writes NaN, which a careless client sends as well.
                body = json.dumps({"model": MODEL, "max_tokens": 8, **fields})
                answer = http.post("/v1/completions", content=body, headers=JSON)
                assert answer.status_code == status, (fields, answer.text)
            if reading.done():
                break
        assert reading.result() == alone


def test_a_prompt_past_the_context_is_refused_in_vllms_words(client, tokenizer, heldout):
    ids = tokenizer.encode(heldout[:4000])[: MAX_MODEL_LEN + 44]
    for prompt in (ids, tokenizer.decode(ids)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
        assert "This model's maximum context length is 256 tokens. However, " in str(caught.value)
        assert "your prompt contains 300 input tokens" in str(caught.value)
        assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        client.completions.create(model=MODEL, prompt=ids[:200], max_tokens=57)
    fitting = greedy(client, ids[:200], 56, extra_body={"ignore_eos": True})
    assert fitting.usage.total_tokens == MAX_MODEL_LEN
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        chat(client, messages=[{"role": "user", "content": heldout[:4000]}])


def test_metrics_move(client, http, tokenizer, heldout):
    prompt = tokenizer.encode(heldout[50_000:51_000])[:200]
    before = wait_until(http, lambda metrics: metrics.idle)
    cold, warm = (greedy(client, prompt, 5) for _ in range(2))
    after = wait_until(http, lambda metrics: metrics.idle)
    assert cold.choices[0].text == warm.choices[0].text
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (cold, warm)]
    assert cached == [0, 192]  # whole pages of 16
    gained = lambda name: after[name] - before[name]
    assert gained("prompt_tokens_total") == 400 and gained("generation_tokens_total") == 10
    assert gained("prefix_cache_queries_total") == 400
    assert gained("prefix_cache_hits_total") == 192
    assert gained("request_success_total:length") == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert gained(f"{name}_count") == 2 and gained(f"{name}_sum") > 0
    assert gained("inter_token_latency_seconds_count") == 8
