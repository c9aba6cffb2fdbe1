"""Who may ask, how much at once, what happens when a client or the engine goes away."""

import json
import threading
import time

import httpx
import pytest

from tests.serve.fake_engine import MODEL, RunningServer
from xlinfer.serve.app import ROUTES

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
KEY = {"authorization": "Bearer key-two"}


def until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.mark.parametrize("key", [None, "Bearer wrong", "key-two", "Basic key-two"])
def test_every_route_but_two_needs_the_key(engine, tokenizer, key):
    with RunningServer(engine, tokenizer, api_keys=("key-one", "key-two")) as running:
        with httpx.Client(base_url=running.url) as client:
            paths = [(method, path.replace("{model:path}", MODEL)) for method, path, *_ in ROUTES]
            headers = {"authorization": key} if key else {}
            for method, path in [*paths, ("GET", "/openapi.json"), ("GET", "/no/such/path")]:
                answer = client.request(method, path, headers=headers)
                if path in ("/live", "/ready"):
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == 401
            for trick in ("//live", "/live/../metrics", "/ready%2f..%2fmetrics", "/LIVE"):
                assert client.get(trick, headers=headers).status_code == 401, trick
            tricked = client.get("/metrics", headers={**headers, "host": "x/live?"})
            assert tricked.status_code in (400, 401)
            assert client.get("/metrics", headers=KEY).status_code == 200


def test_prefixes_are_shared_only_within_a_key(engine, tokenizer):
    with RunningServer(engine, tokenizer, api_keys=("key-one", "key-two")) as running:
        with httpx.Client(base_url=running.url) as client:
            for key, salt in (
                ("key-one", None),
                ("key-two", None),
                ("key-one", "s"),
                ("key-one", None),
            ):
                headers = {"authorization": f"Bearer {key}"}
                body = {"prompt": "x", "max_tokens": 1, "cache_salt": salt}
                assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    salts = [request.cache_salt for request in engine.seen]
    assert salts[0] == salts[3] and len(set(salts)) == 3
    assert not any("key" in salt for salt in salts)


def test_no_key_means_no_salt(engine, http):
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert engine.seen[0].cache_salt == ""


def test_request_ids(http):
    mine = http.get("/version", headers={"x-request-id": "abc-1"})
    assert mine.headers["x-request-id"] == "abc-1"
    for strange in ("a b", "x" * 200, "é"):
        headers = {"x-request-id": strange.encode("latin-1")}
        other = http.get("/version", headers=headers).headers["x-request-id"]
        assert len(other) == 32 and other.isalnum()
    body = {"prompt": "x", "max_tokens": 1}
    done = http.post("/v1/completions", json=body, headers={"x-request-id": "abc-2"})
    assert done.json()["id"] == "cmpl-abc-2"
    done = http.post("/v1/completions", json={**body, "request_id": "mine"})
    assert done.json()["id"] == "cmpl-mine"


def test_the_frames_of_a_stream(http, engine):
    engine.step_s = 0.05  # long enough that no two tokens share a frame
    body = {**CHAT, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *frames, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    values = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    assert [len(value["choices"]) for value in values] == [1, 1, 1, 0]
    assert values[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [value["choices"][0]["finish_reason"] for value in values[:3]] == [None, None, "length"]
    assert "stop_reason" in values[2]["choices"][0]
    assert values[3]["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_aborted(server, engine, stream):
    engine.step_s = 0.01
    body = {**CHAT, "n": 2, "stream": stream}
    with httpx.Client(base_url=server.url, timeout=0.3) as client:
        with pytest.raises(httpx.ReadTimeout):
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                for _ in answer.iter_raw():
                    engine.step_s = 0.6  # slower than the client waits
    engine.step_s = 0.0
    until(lambda: len(engine.aborted) == 2)
    assert not engine.has_work


def test_a_client_that_hangs_up_while_queued_is_aborted(server, engine):
    engine.hold.set()
    with httpx.Client(base_url=server.url, timeout=0.2) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"prompt": ["a", "b"]})
    until(lambda: len(engine.aborted) == 2)


def test_a_slow_client_gets_everything(server, engine, tokenizer):
    engine.plan = engine.plan.__class__(
        **{**vars(engine.plan), "max_model_len": 4000, "num_pages": 300}
    )
    body = {"prompt": "x", "max_tokens": 3000, "stream": True}
    with httpx.Client(base_url=server.url, timeout=20) as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            until(lambda: not engine.has_work, 20)  # the engine does not wait for the client
            frames = answer.read().decode().split("\n\n")
    texts = [json.loads(f[6:])["choices"][0]["text"] for f in frames if f.startswith("data: {")]
    ids = [engine.reply[n % len(engine.reply)] for n in range(3000)]
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_full_queue_answers_429_at_once(engine, tokenizer):
    engine.hold.set()
    with RunningServer(engine, tokenizer, max_queued_requests=2) as running:
        with httpx.Client(base_url=running.url, timeout=10) as client:
            running_and_queued = {"prompt": ["x"] * 10, "max_tokens": 1}
            first = threading.Thread(
                target=client.post, args=("/v1/completions",), kwargs={"json": running_and_queued}
            )
            first.start()
            until(lambda: len(engine.seen) == 10)
            start = time.monotonic()
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert time.monotonic() - start < 0.5
            assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["type"] == "TooManyRequestsError"
            assert "x-should-retry" not in refused.headers
            assert 'reason="requests"} 1.0' in client.get("/metrics").text
            engine.hold.clear()
            first.join(10)
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_queued_tokens_are_bounded_but_a_lone_long_prompt_passes(engine, tokenizer):
    engine.hold.set()
    with RunningServer(engine, tokenizer, max_queued_tokens=50) as running:
        with httpx.Client(base_url=running.url, timeout=10) as client:
            body = {"prompt": [5] * 60, "max_tokens": 1}
            first = threading.Thread(
                target=client.post, args=("/v1/completions",), kwargs={"json": body}
            )
            first.start()
            until(lambda: engine.seen)
            refused = client.post("/v1/completions", json={"prompt": [5]})
            assert refused.status_code == 429 and "60 prompt tokens" in refused.text
            engine.hold.clear()
            first.join(10)


def test_too_many_sequences_in_one_request(http, engine):
    answer = http.post("/v1/completions", json={"prompt": ["x"] * 20, "n": 100})
    assert answer.status_code == 400 and "at most 1024" in answer.text and not engine.seen


def test_one_bad_prompt_of_many_runs_nothing(http, engine):
    answer = http.post("/v1/completions", json={"prompt": ["x", "y"], "logit_bias": {"5000": 1}})
    assert answer.status_code == 400 and not engine.has_work


def test_engine_death(server, engine, http):
    assert http.get("/health").status_code == 200
    engine.fail = RuntimeError("device /dev/secret is gone")
    answer = http.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code == 500 and "secret" not in answer.text
    for path in ("/health", "/ready"):
        assert http.get(path).status_code == 503
    assert http.get("/live").status_code == 200
    assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 500


def test_a_hung_step_is_unhealthy(server, engine, http, monkeypatch):
    monkeypatch.setattr("xlinfer.serve.engine_thread.HANG_S", 0.2)
    with httpx.Client(base_url=server.url, timeout=0.05) as client:
        engine.step_s = 1.0
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    until(lambda: http.get("/health").status_code == 503)
    until(lambda: http.get("/health").status_code == 200)  # it was only slow
    time.sleep(0.3)
    assert http.get("/health").status_code == 200  # idle is healthy


def test_loading(engine, tokenizer):
    loaded = threading.Event()

    def make():
        assert loaded.wait(10)
        return running.built

    running = RunningServer(engine, tokenizer, make=make)
    with running, httpx.Client(base_url=running.url, timeout=10) as client:
        assert client.get("/live").status_code == 200
        for path in ("/ready", "/health"):
            assert client.get(path).status_code == 503
        refused = client.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert "loading" in refused.json()["error"]["message"]
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] is None
        loaded.set()
        until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_drain_finishes_what_runs_and_refuses_the_rest(server, engine, http):
    engine.step_s = 0.02
    texts = []

    def one():
        with httpx.Client(base_url=server.url, timeout=10) as client:
            texts.append(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 20}))

    thread = threading.Thread(target=one)
    thread.start()
    until(lambda: engine.seen)
    drained = threading.Thread(
        target=server.on_loop, args=(lambda: server.server.engine.drain(5.0),)
    )
    drained.start()
    until(lambda: http.get("/ready").status_code == 503)
    assert http.post("/v1/completions", json={"prompt": "y"}).status_code == 503
    thread.join(10)
    drained.join(10)
    assert texts[0].json()["usage"]["completion_tokens"] == 20


def test_drain_ends_what_does_not_finish_with_an_error_event(server, engine):
    engine.step_s = 0.01
    with httpx.Client(base_url=server.url, timeout=10) as client:
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.on_loop(lambda: server.server.engine.drain(0.1))
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["code"] == 503
    until(lambda: len(engine.aborted) == 1)


def test_tokenize_and_detokenize(http, tokenizer):
    text = "def f():\n  return 'naïve 🎉'"
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode(text) and answer["max_model_len"] == 256
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}
    chat = http.post("/tokenize", json=CHAT).json()
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat["tokens"] == tokenizer.encode(prompt)
    for bad in ({}, {"prompt": "x", **CHAT}, {"prompt": 3}):
        assert http.post("/tokenize", json=bad).status_code == 400
    for bad in ({"tokens": [4096]}, {"tokens": [-1]}, {"tokens": "x"}, {}):
        assert http.post("/detokenize", json=bad).status_code == 400
    assert http.post("/tokenize", json={"prompt": "x", "model": "no"}).status_code == 404


def test_metrics_count(http):
    done = http.post("/v1/completions", json={"prompt": "# add two", "max_tokens": 7}).json()
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "n": 2})
    text = http.get("/metrics").text
    label = 'engine="0",model_name="fake-model"'
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values[f"vllm:generation_tokens_total{{{label}}}"] == "13.0"
    assert values[f"vllm:num_requests_running{{{label}}}"] == "0.0"
    assert values[f"vllm:kv_cache_usage_perc{{{label}}}"] == "0.25"
    reason = f'vllm:request_success_total{{engine="0",finished_reason="length",{label[11:]}}}'
    assert values[reason] == "3.0"
    assert values[f"vllm:time_to_first_token_seconds_count{{{label}}}"] == "2.0"
    assert values[f"vllm:inter_token_latency_seconds_count{{{label}}}"] == "10.0"
    assert values[f"vllm:e2e_request_latency_seconds_count{{{label}}}"] == "3.0"
    assert values[f"vllm:request_generation_tokens_sum{{{label}}}"] == "13.0"
    prompts = done["usage"]["prompt_tokens"] + 1
    assert values[f"vllm:request_prompt_tokens_sum{{{label}}}"] == f"{prompts}.0"
    assert values[f"vllm:request_params_n_sum{{{label}}}"] == "3.0"
    assert 'vllm:cache_config_info{block_size="16"' in text
    assert f"vllm:iteration_tokens_total_count{{{label}}}" in values


def test_a_canary_in_prompt_or_key_is_nowhere(engine, tokenizer, caplog, capfd):
    caplog.set_level("INFO")
    with RunningServer(engine, tokenizer, api_keys=("canary-key",)) as running:
        headers = {"authorization": "Bearer canary-key"}
        with httpx.Client(base_url=running.url, headers=headers) as client:
            client.post("/v1/completions", json={"prompt": "canary-prompt", "max_tokens": 1})
            bad = client.post("/v1/completions", json={"prompt": "canary-prompt", "n": 0})
            client.post("/v1/completions?canary-prompt", json={"prompt": ["canary-prompt", 1]})
            engine.fail = RuntimeError("x")
            client.post("/v1/completions", json={"prompt": "canary-prompt", "max_tokens": 1})
            seen = client.get("/metrics").text + bad.text
    logged = [r.getMessage() for r in caplog.records if not r.name.startswith("http")]
    seen += "".join(logged) + "".join(capfd.readouterr())
    assert any("POST /v1/completions 200" in line for line in logged)
    assert "canary" not in seen
