"""Lines of an OpenAI Batch file in, result lines out: the server's own answers and refusals."""

import json

import pytest

from tests.serve.fake_engine import FakeEngine, make_plan
from xlinfer.config import GenerationConfig
from xlinfer.score.options import TaskOptions
from xlinfer.score.rows import BadRow, Row
from xlinfer.score.scorer import make_scorer
from xlinfer.serve.build import Built
from xlinfer.serve.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Add two numbers"}]


def line(url: str, body: object, method: str = "POST") -> dict:
    return {"custom_id": "mine", "method": method, "url": url, "body": body}


def answers(built: Built, lines: list[dict], **options) -> list[dict]:
    rows = (Row(number=n, id=str(n), values=one) for n, one in enumerate(lines))
    scorer = make_scorer(built, TaskOptions(task="openai_batch", **options))
    found = sorted(scorer(rows), key=lambda one: one.row.number)
    assert [one.row.number for one in found] == list(range(len(lines)))
    assert not built.engine.has_work
    for one in found:
        assert not isinstance(one.result, BadRow)
        assert one.result.keys() == {"id", "custom_id", "response", "error"}
        assert one.result["custom_id"] == "mine"
        json.dumps(one.result)
    return [dict(one.result) for one in found]  # type: ignore[arg-type]


def test_all_three_kinds_of_lines(built):
    chat, completion, embedding = answers(
        built,
        [
            line(CHAT, {"model": "any", "messages": MESSAGES, "max_tokens": 5, "temperature": 0}),
            line("/v1/completions", {"model": "any", "prompt": ["import", "def"], "max_tokens": 3}),
            line("/v1/embeddings", {"model": "any", "input": ["a", "b c"], "dimensions": 4}),
        ],
    )
    for one in (chat, completion, embedding):
        assert one["error"] is None and one["response"]["status_code"] == 200
        assert one["response"]["request_id"] and one["response"]["body"]["model"] == "any"
    assert chat["response"]["body"]["object"] == "chat.completion"
    assert chat["response"]["body"]["usage"]["completion_tokens"] == 5
    assert len(completion["response"]["body"]["choices"]) == 2
    vectors = [one["embedding"] for one in embedding["response"]["body"]["data"]]
    assert [len(vector) for vector in vectors] == [4, 4]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1)


def test_a_refused_line_is_a_result_with_the_servers_error(built):
    found = answers(
        built,
        [
            line(CHAT, {"model": "any", "messages": MESSAGES, "max_tokens": 10**6}),
            line(CHAT, {"messages": "hello"}),
            line("/v1/completions", {"prompt": "a", "temperature": -1}),
            line("/v1/embeddings", {"input": "a", "dimensions": 10**6}),
        ],
    )
    says = ["maximum context length", "messages", "temperature", "dimensions"]
    for one, text in zip(found, says, strict=True):
        assert one["error"] is None and one["response"]["status_code"] == 400
        assert text in one["response"]["body"]["error"]["message"]


def test_what_no_server_is_asked(built):
    lines = [
        (line("/v1/images", {}), "invalid_url"),
        (line(CHAT, {}, method="GET"), "invalid_method"),
        (line(CHAT, [1]), "invalid_body"),
        (line(CHAT, {"messages": MESSAGES, "stream": True}), "invalid_body"),
    ]
    found = answers(built, [one for one, _ in lines])
    for one, (_, code) in zip(found, lines, strict=True):
        assert one["response"] is None and one["error"]["code"] == code


def test_other_models_are_refused_where_names_are_given(built):
    body = {"prompt": "a", "max_tokens": 1}
    lines = [line("/v1/completions", {**body, "model": name}) for name in ("mine", "other")]
    found = answers(built, lines, served_model_names=("mine",))
    assert [one["response"]["status_code"] for one in found] == [200, 404]


@pytest.fixture
def fake():
    tokenizer = Tokenizer.open("tests/data/tokenizer")
    engine = FakeEngine(tokenizer.encode("def add"), make_plan())
    generation = GenerationConfig(eos_token_ids=(0,))
    return Built(engine=engine, tokenizer=tokenizer, generation=generation)


def test_an_engine_that_fails_fails_the_job(fake):
    """No line may be committed with an error that is not its own."""
    rows = (
        Row(number=n, id=f"row-{n}", values=line("/v1/completions", {"prompt": "a"}))
        for n in range(100)
    )
    found = make_scorer(fake, TaskOptions(task="openai_batch"))(rows)
    next(found)
    fake.engine.fail = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="The engine has failed"):
        list(found)


def test_lines_are_asked_for_as_there_is_room(fake):
    asked = 0

    def endless():
        nonlocal asked
        for asked in range(10**6):
            body = {"prompt": "a", "max_tokens": 2}
            yield Row(number=asked, id=str(asked), values=line("/v1/completions", body))

    found = make_scorer(fake, TaskOptions(task="openai_batch"))(endless())
    for done in range(50):
        next(found)
        assert asked <= done + 4 * fake.engine.plan.max_num_seqs
    found.close()  # type: ignore[attr-defined]
    assert not fake.engine.has_work
