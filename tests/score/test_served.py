"""The server over the demo model, as lm-evaluation-harness's `local-completions` and clients of
embeddings meet it: no model of ours on their side."""

import asyncio
import base64
from importlib.util import find_spec
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from lm_eval.models import openai_completions
from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support

from tests.score.conftest import ATOL
from tests.serve.fake_engine import RunningServer

MODEL = "demo"
LocalCompletionsAPI: Any = openai_completions.LocalCompletionsAPI  # its decorator hides its type
CODE = "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    return"


@pytest.fixture(scope="module")
def server(built):
    with RunningServer(
        built.engine, built.tokenizer, generation=built.generation, served_model_names=(MODEL,)
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


CONTINUATIONS = [" a * b\n", " a + b\n", " banana", "\n"]


def test_the_harness_reads_its_scores_in_our_answers(http, built, scores):
    """Its own payload (echo, logprobs, one token) and its own reading of the answer, by batches of
    token prompts."""
    harness = LocalCompletionsAPI.__new__(LocalCompletionsAPI)
    harness.model = MODEL
    start = len(built.tokenizer.encode(CODE))
    prompts = [built.tokenizer.encode(CODE + text) for text in CONTINUATIONS]
    payload = harness._create_payload(prompts, generate=False)
    answer = http.post("/v1/completions", json=payload)
    assert answer.status_code == 200, answer.text
    got = LocalCompletionsAPI.parse_logprobs(answer.json(), prompts, [start] * len(prompts))
    for prompt, (total, greedy) in zip(prompts, got, strict=True):
        want, is_greedy = scores(prompt, start)
        assert (total, greedy) == (pytest.approx(sum(want), abs=1e-3), is_greedy)


def test_no_token_at_all_gives_the_same_scores(http, built):
    prompt = built.tokenizer.encode(CODE)
    body = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0}
    found = []
    for max_tokens in (0, 1):
        answer = http.post("/v1/completions", json={**body, "max_tokens": max_tokens}).json()
        (choice,) = answer["choices"]
        assert answer["usage"]["completion_tokens"] == max_tokens
        found.append(choice["logprobs"])
    assert len(found[0]["token_logprobs"]) == len(prompt) == len(found[1]["token_logprobs"]) - 1
    assert found[0]["token_logprobs"][0] is None and found[0]["top_logprobs"][0] is None
    for name in ("tokens", "text_offset"):
        assert found[0][name] == found[1][name][:-1]
    pairs = zip(found[0]["token_logprobs"][1:], found[1]["token_logprobs"][1:], strict=False)
    assert all(one == pytest.approx(other, abs=ATOL) for one, other in pairs)


def test_its_remote_tokenizer_is_ours(server, built):
    url = f"{server.url}/v1/completions"
    assert check_remote_tokenizer_support(url, max_retries=1)
    tokenizer = RemoteTokenizer(url)
    assert tokenizer.encode(CODE) == built.tokenizer.encode(CODE, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(CODE)) == CODE
    assert (tokenizer.eos_token, tokenizer.bos_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.tokenizer_info["chat_template"] == built.tokenizer.chat_template.source


@pytest.mark.skipif(find_spec("tenacity") is None, reason="needs lm-eval[api]")
def test_local_completions_as_the_harness_runs_it(server, built, scores):
    from lm_eval.api.instance import Instance

    model = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model=MODEL, tokenizer_backend="remote",
        num_concurrent=2, batch_size=2, max_length=96,
    )  # fmt: skip
    make = lambda kind, *a: Instance(request_type=kind, doc={}, arguments=a, idx=0)
    got = model.loglikelihood([make("loglikelihood", CODE, text) for text in CONTINUATIONS])
    start = len(built.tokenizer.encode(CODE))
    for text, (total, greedy) in zip(CONTINUATIONS, got, strict=True):
        want, is_greedy = scores(built.tokenizer.encode(CODE + text), start)
        assert (total, greedy) == (pytest.approx(sum(want), abs=1e-3), is_greedy)
    (total,) = model.loglikelihood_rolling([make("loglikelihood_rolling", CODE * 5)])
    assert total < 0
    kwargs = {"until": ["\n"], "max_gen_toks": 8}
    (text,) = model.generate_until([make("generate_until", CODE, kwargs)])
    assert text and "\n" not in text


def test_embeddings(client, built, plain):
    texts = ["import os", CODE]
    answer = client.embeddings.create(model=MODEL, input=texts)  # base64 on the wire
    for index, (text, one) in enumerate(zip(texts, answer.data, strict=True)):
        want = plain(built.tokenizer.encode(text))[1][-1]
        assert one.index == index
        np.testing.assert_allclose(one.embedding, want / np.linalg.norm(want), atol=ATOL)
    tokens = [built.tokenizer.encode(text) for text in texts]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, tokens))
    by_ids = client.embeddings.create(model=MODEL, input=tokens, encoding_format="float")
    for one, other in zip(answer.data, by_ids.data, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=ATOL)


def test_fewer_dimensions_are_of_length_1_too(client, http):
    (whole,) = client.embeddings.create(model=MODEL, input="import os").data
    (cut,) = client.embeddings.create(model=MODEL, input="import os", dimensions=16).data
    want = np.array(whole.embedding[:16])
    np.testing.assert_allclose(cut.embedding, want / np.linalg.norm(want), atol=ATOL)
    body = {"model": MODEL, "input": "import os", "encoding_format": "base64"}
    text = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), whole.embedding)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": ""}, "input", "must not be empty"),
        ({"input": []}, "input", "input must be a string"),
        ({"input": [[4096]]}, "input", "token ids from 0 to 4095"),
        ({"input": "word " * 200}, "input", "maximum context length is 96 tokens"),
        ({"dimensions": 257}, "dimensions", "from 1 to 256"),
        ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    ],
)
def test_bad_embeddings(client, fields, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as error:
        client.embeddings.create(
            **{"model": MODEL, "input": "a", "encoding_format": "float", **fields}
        )
    assert error.value.param == param


def test_embeddings_beside_answers(server, client):
    """Both at once, and each as alone."""
    alone = client.embeddings.create(model=MODEL, input=CODE).data[0].embedding

    async def both():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as many:
            texts = [
                many.completions.create(model=MODEL, prompt=CODE, max_tokens=20) for _ in range(6)
            ]
            vectors = [many.embeddings.create(model=MODEL, input=CODE) for _ in range(6)]
            _, found = await asyncio.gather(asyncio.gather(*texts), asyncio.gather(*vectors))
            return found

    for answer in asyncio.run(both()):
        np.testing.assert_allclose(answer.data[0].embedding, alone, atol=ATOL)
