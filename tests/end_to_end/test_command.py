"""`python -m xlinfer.serve` with the demo model, as a newcomer runs it."""

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "xlinfer.serve"]
SMALL = ("--max_num_seqs=2", "--max_num_batched_tokens=32", "--max-model-len=128")
READY_S = 120  # even where others use the machine
ANSWERS = 24  # for two rows: enough work to be under way when the signal comes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def running(log: Path, *arguments: str):
    """The process; its standard error goes to `log`."""
    with log.open("w") as stderr:
        process = subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stderr=stderr)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for_status(process: subprocess.Popen, url: str, status: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "it has ended"
        try:
            if (answer := httpx.get(url)).status_code == status:
                return
            assert answer.status_code == 503
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"{url} does not answer {status}")


def fail(*arguments: str) -> tuple[int, list[str]]:
    """(exit code, lines of standard error) of a command that should end by itself."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()


def test_from_a_cold_start_to_a_drained_end(tmp_path):
    url, log, cache = f"http://127.0.0.1:{free_port()}", tmp_path / "log", tmp_path / "compiled"
    port = f"--port={url.rpartition(':')[2]}"
    with running(log, port, *SMALL, f"--compile_cache_dir={cache}") as process:
        wait_for_status(process, f"{url}/live", 200, 20)
        # While it loads it says so, and does not take work.
        loading = httpx.get(f"{url}/ready")
        assert (loading.status_code, "loading" in loading.text) == (503, True)
        early = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert early.status_code == 503 and int(early.headers["retry-after"]) > 0
        wait_for_status(process, f"{url}/ready", 200, READY_S)
        said = log.read_text()
        assert re.search(r"Loading weights: (\d+)/\1 MiB", said)
        assert re.search(r"Compiling: (\d+)/\1 ", said)
        assert f"at {url}/v1 (2 sequences of up to 128 tokens)" in said

        # The curl line, as a shell would read it.
        words = shlex.split(next(line for line in said.splitlines() if "curl " in line))
        address, options = words[1], dict(zip(words[2::2], words[3::2], strict=True))
        headers = dict([options["-H"].split(": ")])
        answer = httpx.post(address, headers=headers, content=options["-d"]).json()
        assert answer["model"] == "pystd-8m" and answer["usage"]["completion_tokens"] == 64
        assert len(answer["choices"][0]["text"]) > 64
        assert any(cache.iterdir())

        # A signal does not cut what is being said.
        ask = {"prompt": "def f(", "n": ANSWERS, "max_tokens": 100, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**ask, "stream": True, "seed": 1}, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            wait_for_status(process, f"{url}/ready", 503, 5)
            late = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert late.status_code == 503 and "shutting down" in late.text
            rest = [line for line in lines if line]
        events = [line.removeprefix("data: ") for line in [first, *rest]]
        assert events[-1] == "[DONE]"
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        ends = [choice["index"] for choice in choices if choice["finish_reason"] == "length"]
        assert sorted(ends) == list(range(ANSWERS))
        assert process.wait(20) == 0
    assert "Traceback" not in log.read_text()


def test_an_unknown_flag():
    code, lines = fail("--max_num_seq=2")
    assert code == 2 and lines[0].startswith("error: Unknown command line flag 'max_num_seq'")
    assert "max_num_seqs" in lines[0] and lines[1:] == ["Try: python -m xlinfer.serve --help"]


def test_a_folder_that_is_not_there(tmp_path):
    port = f"--port={free_port()}"
    code, lines = fail(f"--model={tmp_path / 'nowhere'}", port, "--compile_cache_dir=")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("error: ") and str(tmp_path / "nowhere") in lines[0]


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, lines = fail(f"--port={port}")
    assert code == 1
    assert lines == [
        f"error: Cannot listen on 127.0.0.1:{port}: Address already in use. "
        "Choose another --port or --host."
    ]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--max_model_len=4096", "max_position_embeddings=2048"),
        ("--num_pages=3", "num_pages=3 cannot hold"),
    ],
)
def test_numbers_that_do_not_fit(flag, said):
    code, lines = fail(flag, f"--port={free_port()}", "--compile_cache_dir=")
    assert code == 1 and lines[-1].startswith("error: ") and said in lines[-1]
