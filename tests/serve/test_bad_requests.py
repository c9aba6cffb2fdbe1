"""Every bad request is one clear error naming the field, and the engine outlives it."""

import json
import socket

import httpx
import pytest

from tests.serve.fake_engine import MODEL, RunningServer

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hi"}

# (what is wrong, route, fields beside a good request, param, part of the message)
BAD_FIELDS = [
    ("negative max_tokens", TEXT, {"max_tokens": -1}, "max_tokens", "max_tokens must be"),
    ("no tokens", TEXT, {"max_tokens": 0}, "max_tokens", "at least 1"),
    ("no chat tokens", CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
    ("negative", CHAT, {"max_completion_tokens": -5}, "max_completion_tokens", "at least 1"),
    ("huge max_tokens", CHAT, {"max_tokens": 10**30}, "max_tokens", "maximum context length"),
    ("over the context", TEXT, {"max_tokens": 256}, "max_tokens", "you requested 256 output"),
    ("nan", TEXT, {"temperature": float("nan")}, "temperature", "temperature must be a number"),
    ("infinity", TEXT, {"temperature": float("inf")}, "temperature", "must be a number"),
    ("negative temperature", CHAT, {"temperature": -1}, "temperature", "must be a number"),
    ("top_p", CHAT, {"top_p": 1.5}, "top_p", "top_p"),
    ("n", CHAT, {"n": 0}, "n", "n must be"),
    ("many n", CHAT, {"n": 100000}, "n", "n must be an integer from 1 to 128"),
    ("bias id", TEXT, {"logit_bias": {"9999": 1}}, "logit_bias", "9999"),
    ("bias key", TEXT, {"logit_bias": {"x": 1}}, "logit_bias", "logit_bias"),
    ("bias value", TEXT, {"logit_bias": {"5": 101}}, "logit_bias", "100"),
    ("ids", TEXT, {"allowed_token_ids": []}, "allowed_token_ids", "empty"),
    ("stop ids", TEXT, {"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids"),
    ("many stops", TEXT, {"stop": ["x"] * 10_000}, "stop", "at most 64"),
    ("empty stop", TEXT, {"stop": ""}, "stop", "1 to"),
    ("logprobs", TEXT, {"logprobs": 6}, "logprobs", "max allowed: 5"),
    ("all logprobs", TEXT, {"logprobs": -1}, "logprobs", "max allowed: 5"),
    ("top_logprobs", CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ("no logprobs", CHAT, {"top_logprobs": 2}, "top_logprobs", "must be set to true"),
    ("stream options", CHAT, {"stream_options": {}}, "stream_options", "stream=True"),
    ("type", TEXT, {"n": "many"}, "n", "integer"),
    ("nested type", CHAT, {"stop_token_ids": [1, "x"]}, "stop_token_ids.1", "integer"),
    ("seed", TEXT, {"seed": 2**64}, "seed", "seed must be"),
    ("min_tokens", TEXT, {"min_tokens": 99}, "min_tokens", "at most max_tokens"),
    ("bad words", TEXT, {"bad_words": ["  "]}, "bad_words", "only spaces"),
    ("prompt type", {}, {"prompt": {"a": 1}}, "prompt", "prompt must be"),
    ("prompt missing", {}, {}, "prompt", "prompt must be"),
    ("prompt empty", {}, {"prompt": ""}, "prompt", "must not be empty"),
    ("prompt no ids", {}, {"prompt": []}, "prompt", "prompt must be"),
    ("prompt mixed", {}, {"prompt": [1, "x"]}, "prompt", "prompt must be"),
    ("prompt bools", {}, {"prompt": [True]}, "prompt", "prompt must be"),
    ("prompt id", {}, {"prompt": [1, 4096]}, "prompt", "from 0 to 4095, got 4096"),
    ("prompt negative id", {}, {"prompt": [[1, -1]]}, "prompt", "got -1"),
    ("prompt huge id", {}, {"prompt": [10**30]}, "prompt", "from 0 to 4095"),
    ("surrogate", {}, {"prompt": "a\ud800"}, "prompt", "Unicode"),
    ("long ids", {}, {"prompt": [5] * 257}, "prompt", "your prompt contains 257 input tokens"),
    ("full", {}, {"prompt": [5] * 256}, "prompt", "maximum context length is 256"),
    ("very long", {}, {"prompt": "ab " * 400_000}, "prompt", "contains at least"),
    ("no messages", {"messages": []}, {}, "messages", "non-empty"),
    ("image", {}, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages.0.content.0.type", "only text"),
    ("role", {}, {"messages": [{"content": "x"}]}, "messages.0.role", "role"),
    ("tool message", {}, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role",
     "tools"),
    ("continue", CHAT, {"continue_final_message": True}, "continue_final_message", "Cannot set"),
    ("kwargs", CHAT, {"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "must not"),
    ("template", CHAT, {"chat_template": "{{ 1 }}"}, "chat_template", "never run"),
    ("tools", CHAT, {"tools": []}, "tools", "not supported yet"),
    ("format", CHAT, {"response_format": {"type": "json_object"}}, "response_format", "text"),
    ("guided", TEXT, {"guided_json": {}}, "guided_json", "not supported"),
    ("structured", TEXT, {"structured_outputs": {"regex": "a"}}, "structured_outputs", "not"),
    ("best_of", TEXT, {"best_of": 3}, "best_of", "equal to n"),
    ("suffix", TEXT, {"suffix": "end"}, "suffix", "not supported"),
    ("beams", TEXT, {"use_beam_search": True}, "use_beam_search", "not supported"),
    ("store", CHAT, {"store": True}, "store", "not supported"),
    ("truncation", TEXT, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "from 1"),
    ("request_id", TEXT, {"request_id": "a\nb"}, "request_id", "pattern"),
]  # fmt: skip


@pytest.fixture(scope="module")
def module_server(tokenizer):
    from tests.serve.fake_engine import FakeEngine, make_plan

    with RunningServer(FakeEngine(tokenizer.encode("abc " * 9), make_plan()), tokenizer) as running:
        with httpx.Client(base_url=running.url, timeout=20) as client:
            yield client


def route(body: dict) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


@pytest.mark.parametrize(
    ("good", "bad", "param", "said"),
    [row[1:] for row in BAD_FIELDS],
    ids=[r[0] for r in BAD_FIELDS],
)
def test_bad_field(module_server, good, bad, param, said):
    body = {**good, **bad}
    answer = post(module_server, route(body), body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"] and error["code"] == 400
    assert error["type"] in ("BadRequestError", "Bad Request")
    assert answer.headers["x-should-retry"] == "false"
    assert post(module_server, "/v1/completions", {"prompt": "ok"}).status_code == 200


def post(client: httpx.Client, path: str, body: object) -> httpx.Response:
    """JSON as Python's own, which lets NaN and half surrogates through as hostile clients do."""
    return client.post(
        path, content=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )


@pytest.mark.parametrize(
    ("content", "content_type", "said"),
    [
        (b'{"prompt": ', "application/json", "not valid JSON at character 11"),
        (b"", "application/json", "not valid JSON"),
        (b"\xff\xfe\x00", "application/json", "not valid JSON"),
        (b"[" * 100_000, "application/json", "not valid JSON"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b"9" * 5000, "application/json", "not valid JSON"),
        (b'{"prompt": "x"}', "text/plain", "Content-Type header must be application/json"),
        (b"prompt=x", "application/x-www-form-urlencoded", "Content-Type"),
        (b'{"prompt": "x"}', "", "it is missing"),
    ],
)
def test_bad_body(module_server, content, content_type, said):
    headers = {"content-type": content_type} if content_type else {}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = module_server.post(path, content=content, headers=headers)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


def test_unknown_model_and_path_and_method(module_server):
    missing = post(module_server, "/v1/chat/completions", {**CHAT, "model": "other"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = module_server.request(method, path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)


def test_neutral_values_are_accepted(module_server):
    neutral = {"best_of": 1, "suffix": None, "use_beam_search": False, "length_penalty": 1.0}
    neutral |= {"user": "me", "store": False, "service_tier": "auto", "metadata": {"a": "b"}}
    neutral |= {"guided_json": None, "logprobs": None, "stop": None, "logit_bias": None}
    answer = post(module_server, "/v1/completions", {**TEXT, **neutral, "model": MODEL})
    assert answer.status_code == 200 and "x-ignored-fields" not in answer.headers
    chat = {"response_format": {"type": "text"}, "top_logprobs": None, "tools": None}
    chat |= {"tool_choice": "none", "modalities": ["text"], "max_tokens": None}
    assert post(module_server, "/v1/chat/completions", {**CHAT, **chat}).status_code == 200
    both = post(module_server, "/v1/completions", {**TEXT, "n": 2, "best_of": 2})
    assert len(both.json()["choices"]) == 2
    assert post(module_server, "/v1/completions", {**TEXT, "best_of": True}).status_code == 400


def test_unknown_fields_are_named(module_server):
    messages = [{"role": "user", "content": "hi", "mood": 1}]
    body = {"messages": messages, "max_tokens": 2, "my_field": 1, "b\nc,d": 2}
    answer = post(module_server, "/v1/chat/completions", body)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "my_field, b?c?d, messages.0.mood"
    assert 'xlinfer:ignored_fields_total{model_name="fake-model"} 3.0' in (
        module_server.get("/metrics").text
    )


def test_strict_fields(engine, tokenizer):
    with RunningServer(engine, tokenizer, strict_fields=True) as running:
        with httpx.Client(base_url=running.url) as client:
            answer = post(client, "/v1/completions", {**TEXT, "my_field": 1})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "my_field"
            mood = {"messages": [{"role": "user", "content": "hi", "mood": 1}]}
            answer = post(client, "/v1/chat/completions", mood)
            assert answer.json()["error"]["param"] == "messages.0.mood"


def test_body_above_the_limit(engine, tokenizer):
    with RunningServer(engine, tokenizer, max_request_bytes=1000) as running:
        with httpx.Client(base_url=running.url) as client:
            body = json.dumps({"prompt": "x" * 2000}).encode()
            headers = {"content-type": "application/json"}
            announced = client.post("/v1/completions", content=body, headers=headers)
            # Without a length, in pieces.
            pieces = (body[start : start + 6] for start in range(0, len(body), 6))
            chunked = client.post("/v1/completions", content=pieces, headers=headers)
            for answer in (announced, chunked):
                assert answer.status_code == 413
                assert "at most 1000 bytes" in answer.json()["error"]["message"]
                assert answer.headers["x-should-retry"] == "false"
            assert post(client, "/v1/completions", TEXT).status_code == 200


def test_stalled_body_times_out(engine, tokenizer):
    with RunningServer(engine, tokenizer, read_timeout_s=0.1) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b'Content-Length: 100\r\n\r\n{"prompt"'
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_header_of_a_megabyte(module_server):
    try:
        answer = module_server.get("/live", headers={"x-big": "a" * 2**20})
    except httpx.TransportError:
        pass  # hung up in the middle of it
    else:
        assert answer.status_code in (400, 431)
    assert module_server.get("/live").status_code == 200


def test_internal_failure_tells_nothing_but_the_request_id(engine, http, monkeypatch):
    def broken(request):
        raise KeyError("/secret/path")

    engine.add_request = broken
    answer = http.post("/v1/completions", json=TEXT)
    error = answer.json()["error"]
    assert answer.status_code == 500 and "secret" not in answer.text
    assert error["type"] == "InternalServerError"
    assert error["message"].endswith(f"Request id: {answer.headers['x-request-id']}")
    del engine.add_request
    assert http.post("/v1/completions", json=TEXT).status_code == 200
