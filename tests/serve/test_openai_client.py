"""The HTTP contract as openai-python sees it."""

import asyncio
import math

import openai
import pytest

from tests.serve.conftest import REPLY
from tests.serve.fake_engine import MODEL

MESSAGES = [{"role": "user", "content": "Add two numbers"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(tokenizer, count: int, first: int = 0) -> str:
    ids = tokenizer.encode(REPLY)
    return tokenizer.decode([ids[(first + n) % len(ids)] for n in range(count)])


def test_completion(client, tokenizer):
    done = client.completions.create(model=MODEL, prompt="# add", max_tokens=9)
    assert done.choices[0].text == expected(tokenizer, 9)
    assert (done.choices[0].finish_reason, done.choices[0].index) == ("length", 0)
    prompt = len(tokenizer.encode("# add"))
    assert done.usage.prompt_tokens == prompt and done.usage.completion_tokens == 9
    assert done.usage.total_tokens == prompt + 9
    assert done.usage.prompt_tokens_details.cached_tokens == 3
    assert done.id.startswith("cmpl-") and done.object == "text_completion" and done.model == MODEL


def test_completion_defaults_to_16_tokens(client):
    done = client.completions.create(model=MODEL, prompt="x")
    assert done.usage.completion_tokens == 16


def test_completion_of_prompt_lists_and_n(client, tokenizer):
    ids = tokenizer.encode("# one")
    for prompt in (["# one", "# two"], [ids, ids]):
        done = client.completions.create(model=MODEL, prompt=prompt, n=2, max_tokens=3)
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        texts = [expected(tokenizer, 3, index) for index in (0, 1, 0, 1)]
        assert [choice.text for choice in done.choices] == texts
        assert done.usage.completion_tokens == 12
    single = client.completions.create(model=MODEL, prompt=ids, max_tokens=1)
    assert single.usage.prompt_tokens == len(ids)


def test_completion_stream_adds_up(client, tokenizer):
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=["# a", "# b"],
            n=2,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *body, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 80
    assert all(chunk.usage is None for chunk in body)
    for index in range(4):
        own = [choice for chunk in body for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == expected(tokenizer, 20, index % 2)
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["length"]
        assert own[-1].finish_reason == "length"


def test_completion_logprobs_and_echo(client, tokenizer):
    done = client.completions.create(
        model=MODEL, prompt="# add two", max_tokens=2, logprobs=2, echo=True
    )
    ids = [*tokenizer.encode("# add two"), *tokenizer.encode(REPLY)[:2]]
    logprobs = done.choices[0].logprobs
    assert done.choices[0].text == "# add two" + expected(tokenizer, 2)
    assert logprobs.tokens == [tokenizer.decode([id]) for id in ids]
    assert logprobs.token_logprobs == [None] + [-1.5] * (len(ids) - 1)
    assert logprobs.top_logprobs[0] is None and logprobs.text_offset[0] == 0
    assert logprobs.text_offset[-1] == len("".join(logprobs.tokens[:-1]))
    # The chosen token and its two rivals, of which one is the token itself.
    assert logprobs.top_logprobs[1] == {
        logprobs.tokens[1]: -1.5,
        tokenizer.decode([ids[1] + 1]): -1.0,
    }


def test_echo_without_new_tokens_scores_the_prompt(client, tokenizer):
    done = client.completions.create(
        model=MODEL, prompt="# add two", max_tokens=0, logprobs=0, echo=True
    )
    count = len(tokenizer.encode("# add two"))
    assert done.choices[0].text == "# add two" and done.usage.completion_tokens == 0
    assert done.choices[0].logprobs.token_logprobs == [None] + [-1.5] * (count - 1)
    plain = client.completions.create(model=MODEL, prompt="# x", max_tokens=0, echo=True)
    assert plain.choices[0].text == "# x" and plain.choices[0].logprobs is None


def test_echoed_stream_equals_the_whole(client):
    asked = {"model": MODEL, "prompt": "# add two", "max_tokens": 5, "logprobs": 1}
    asked |= {"echo": True, "n": 2}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    for index in (0, 1):
        own = [c for chunk in chunks for c in chunk.choices if c.index == index]
        want = whole.choices[index]
        assert "".join(c.text for c in own) == want.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [item for c in own for item in getattr(c.logprobs, name)]
            assert parts == getattr(want.logprobs, name), name


def test_chat(client, engine, tokenizer):
    done = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, n=2)
    prompt = "<|im_start|>user\nAdd two numbers<|im_end|>\n<|im_start|>assistant\n"
    assert engine.seen[0].prompt_token_ids == tuple(tokenizer.encode(prompt))
    assert [c.message.content for c in done.choices] == [expected(tokenizer, 8, n) for n in (0, 1)]
    assert done.choices[0].message.role == "assistant"
    assert done.object == "chat.completion" and done.id.startswith("chatcmpl-")


def test_chat_uses_the_rest_of_the_context(client, engine):
    done = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert done.usage.total_tokens == engine.plan.max_model_len
    assert done.choices[0].finish_reason == "length"


def test_max_completion_tokens_beats_max_tokens(client):
    done = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=9, max_completion_tokens=2
    )
    assert done.usage.completion_tokens == 2


def test_chat_stream_has_the_exact_chunk_sequence(client, tokenizer):
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=18,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *body, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 36
    for index in (0, 1):
        own = [choice for chunk in body for choice in chunk.choices if choice.index == index]
        first, *rest = own
        assert (first.delta.role, first.delta.content, first.finish_reason) == (
            "assistant",
            "",
            None,
        )
        assert all(choice.delta.role is None for choice in rest)
        assert "".join(c.delta.content or "" for c in rest) == expected(tokenizer, 18, index)
        assert [c.finish_reason for c in own if c.finish_reason] == ["length"]
        assert own[-1].finish_reason == "length" and own[-1].stop_reason is None
    assert all("\ufffd" not in (c.delta.content or "") for k in body for c in k.choices)


def test_continuous_usage(client):
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 4


def test_chat_logprobs(client, tokenizer):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 14}
    asked |= {"logprobs": True, "top_logprobs": 2}
    done = client.chat.completions.create(**asked)
    content = done.choices[0].logprobs.content
    ids = tokenizer.encode(REPLY)[:14]
    spelled = b"".join(bytes(entry.bytes) for entry in content)
    # Bytes add up even where single tokens are parts of characters.
    assert spelled == b"".join(tokenizer.token_bytes(id) for id in ids)
    assert [entry.token for entry in content] == [tokenizer.token_text(id) for id in ids]
    assert all(math.isclose(entry.logprob, -1.5) for entry in content)
    assert [rival.logprob for rival in content[0].top_logprobs] == [-1.0, -1.5]
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [
        entry for k in chunks for c in k.choices if c.logprobs for entry in c.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(client, engine, tokenizer, include):
    text = expected(tokenizer, 40)
    stop = text[text.index("return") + 3 : text.index("return") + 9]  # "urn a "
    assert stop not in {tokenizer.decode([id]) for id in tokenizer.encode(REPLY)}
    asked = {"model": MODEL, "messages": MESSAGES, "stop": ["never", stop]}
    asked |= {"extra_body": {"include_stop_str_in_output": include, "return_token_ids": True}}
    want = text[: text.index(stop) + len(stop) * include]
    done = client.chat.completions.create(**asked)
    choice = done.choices[0]
    assert (choice.message.content, choice.finish_reason) == (want, "stop")
    assert choice.stop_reason == stop
    # The tokens go on up to the one that completed the stop string.
    ids = choice.token_ids
    assert stop in tokenizer.decode(ids) and stop not in tokenizer.decode(ids[:-1])
    chunks = list(client.chat.completions.create(**asked, stream=True))
    got = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert got == want and chunks[-1].choices[0].stop_reason == stop
    assert len(engine.aborted) == 2


def test_stop_tokens_are_not_text(client, tokenizer):
    ids = tokenizer.encode(REPLY)
    done = client.completions.create(
        model=MODEL, prompt="x", max_tokens=30, extra_body={"stop_token_ids": [ids[5]]}
    )
    first = ids.index(ids[5])
    assert done.choices[0].text == tokenizer.decode(ids[:first])
    assert done.choices[0].finish_reason == "stop" and done.choices[0].stop_reason == ids[5]
    assert done.usage.completion_tokens == first + 1


def test_sixty_four_streams_at_once(server, tokenizer):
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=f"# {number}", max_tokens=10 + number % 7, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, number) for number in range(64)))

    texts = asyncio.run(all_of_them())
    assert texts == [expected(tokenizer, 10 + number % 7) for number in range(64)]


def test_errors_arrive_as_the_clients_classes(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="x")
    assert (caught.value.param, caught.value.code) == ("model", "404")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        client.completions.create(model=MODEL, prompt="x " * 900)


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve("alias").max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_failure_in_a_stream_is_an_error_event(client, engine):
    engine.step_s = 0.02
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    next(stream)
    engine.fail = RuntimeError("secret /path/of/device")
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert "secret" not in str(caught.value) and "failed" in str(caught.value)
