"""Servers of two and three processes over gloo: the same answers, and an end for all."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from tests.multihost.processes import (
    HEARTBEAT_S,
    SIZES,
    TOKENIZER,
    Servers,
    answer,
    bodies,
    listening,
)
from xlinfer.request import Request, SamplingParams
from xlinfer.serve.build import EngineOptions, build


def alone(checkpoint, cache, asked: list[dict], devices: int) -> list[list[int]]:
    """The tokens that one process gives."""
    options = EngineOptions(
        model=str(checkpoint), tokenizer=str(TOKENIZER), tensor_parallel_size=devices,
        compile_cache_dir=str(cache), **SIZES,
    )  # fmt: skip
    engine = build(options, lambda *_: None).engine
    names = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "max_tokens")
    for n, body in enumerate(asked):
        given = {name: body[name] for name in names if name in body}
        given["logit_bias"] = {int(k): v for k, v in body.get("logit_bias", {}).items()} or None
        params = SamplingParams(ignore_eos=body["ignore_eos"], **given)
        prompt = tuple(body["prompt"])
        engine.add_request(
            Request(request_id=str(n), prompt_token_ids=prompt, sampling=params, eos_token_ids=(2,))
        )
    tokens: list[list[int]] = [[] for _ in asked]
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
    return tokens


def over_http(servers: Servers, asked: list[dict]) -> list[list[int]]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(partial(answer, servers.url), asked))


def test_two_processes_answer_as_one_and_end_together(checkpoint, cache, tmp_path):
    key = tmp_path / "key"
    key.write_text("s" * 64)
    asked = bodies(24)
    with Servers(checkpoint, cache, 2, f"--plan_key_file={key}") as servers:
        servers.wait_until_ready()
        got = over_http(servers, asked)
        follower = f"http://127.0.0.1:{servers.ports[1]}"
        for path in ("/live", "/ready", "/health"):
            assert httpx.get(f"{follower}{path}").status_code == 200
        assert httpx.post(f"{follower}/v1/completions", json=asked[0]).status_code == 404
        for rank in servers.ranks:
            assert listening(rank.popen.pid) == {"127.0.0.1"}
        # A rank that is told to stop lets the answers finish, and all ranks end.
        long = {**asked[0], "max_tokens": 100, "ignore_eos": True, "prompt": [5, 6]}
        stop = lambda: servers.ranks[1].popen.send_signal(signal.SIGTERM)
        assert len(answer(servers.url, long, begun=stop)) == 100
        assert [rank.exit_code(20) for rank in servers.ranks] == [0, 0]
        assert all("Traceback" not in rank.said() for rank in servers.ranks)
    assert got == alone(checkpoint, cache, asked, devices=2)


@pytest.mark.parametrize(
    ("count", "victim"),
    [(2, 0), (2, 1), *(pytest.param(3, n, marks=pytest.mark.slow) for n in range(3))],
)
def test_a_killed_rank_ends_all_within_the_heartbeat(checkpoint, cache, count, victim):
    with Servers(checkpoint, cache, count) as servers:
        servers.wait_until_ready()
        long = {**bodies(1)[0], "prompt": [5, 6], "max_tokens": 120, "ignore_eos": True}
        begun = threading.Event()

        def keep_busy() -> None:
            try:
                while True:
                    answer(servers.url, long)
                    begun.set()
            except (httpx.TransportError, AssertionError):
                pass  # the stream ended, or said why it would

        busy = [threading.Thread(target=keep_busy) for _ in range(4)]
        for thread in busy:
            thread.start()
        assert begun.wait(60)
        servers.ranks[victim].popen.kill()
        killed = time.monotonic()
        others = [rank for n, rank in enumerate(servers.ranks) if n != victim]
        assert [rank.exit_code(HEARTBEAT_S + 5) for rank in others] == [1] * len(others)
        assert time.monotonic() - killed < HEARTBEAT_S
        for rank in others:
            assert f"All ranks end: rank {victim} was lost: its connection" in rank.said()
        for thread in busy:
            thread.join(10)


def test_ranks_of_different_commands_do_not_start(checkpoint, cache):
    with Servers(checkpoint, cache, 2, last="--max_num_seqs=4") as servers:
        assert [rank.exit_code(60) for rank in servers.ranks] == [1, 1]
    said = servers.ranks[1].said()
    assert "another command, or has other weights: max_num_seqs is 8, and here 4." in said
    assert "All ranks end: rank 1 could not start: Rank 0 was started" in servers.ranks[0].said()


@pytest.mark.slow
def test_three_processes_answer_200_requests_as_one(checkpoint, cache):
    asked = bodies(200)
    with Servers(checkpoint, cache, 3) as servers:
        servers.wait_until_ready()
        got = over_http(servers, asked)
        os.kill(servers.ranks[0].popen.pid, signal.SIGTERM)
        assert [rank.exit_code(20) for rank in servers.ranks] == [0, 0, 0]
    assert got == alone(checkpoint, cache, asked, devices=3)
