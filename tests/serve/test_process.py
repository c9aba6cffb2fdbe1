"""The process: its command line, its progress, its first words, its signals, its exit codes."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.fake_engine import DATA
from xlinfer.compile.store import Store
from xlinfer.flags import UsageError
from xlinfer.progress import plain_progress, show_progress
from xlinfer.serve.__main__ import server_options_of
from xlinfer.serve.flags import engine_options, help_text, parse

ROOT = Path(__file__).parents[2]
# The real entry point, with an engine that answers "x " for ever in place of the model's.
PROGRAM = """
import sys, time
from tests.serve.fake_engine import EOS, FakeEngine, make_plan
from xlinfer.config import GenerationConfig
from xlinfer.serve import __main__ as entry
from xlinfer.serve.build import Built
from xlinfer.serve.tokenizer import Tokenizer

def build(options, progress):
    progress("load", 1, 2)
    time.sleep(LOAD_S)
    if options.model == "bad":
        raise ValueError("bad has no config.json")
    tokenizer = Tokenizer.open("DATA")
    engine = FakeEngine(tokenizer.encode(" x"), make_plan(), step_s=0.02)
    return Built(engine=engine, tokenizer=tokenizer, generation=GenerationConfig(eos_token_ids=EOS))

entry.build = build
entry.main(["serve", *sys.argv[1:]])
"""


class Process:
    def __init__(self, *arguments: str, load_s: float = 0.0):
        program = PROGRAM.replace("LOAD_S", str(load_s)).replace("DATA", str(DATA))
        self.popen = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        with self.popen.stderr as stderr:
            self.lines += iter(stderr.readline, "")

    def wait_for(self, text: str) -> str:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if text in line:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"{text!r} not in {self.lines}")

    def exit_code(self) -> int:
        code = self.popen.wait(20)
        self._reader.join(5)
        return code


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_from_start_to_drained_end():
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = Process(f"--port={port}", "--drain-timeout-s=10", load_s=1.0)
    deadline = time.monotonic() + 15
    while True:  # it answers while it loads
        try:
            assert httpx.get(f"{url}/live").status_code == 200
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert httpx.get(f"{url}/ready").status_code == 503
    assert f"{url}/v1" in process.wait_for("Ready in")
    curl = process.wait_for("curl ")
    body = curl.split(" -d ")[1].strip().strip("'")
    assert httpx.post(f"{url}/v1/completions", json=json.loads(body)).status_code == 200
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 40, "stream": True}
    ) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("Draining")
        assert httpx.get(f"{url}/ready").status_code == 503
        frames = [line for line in [first, *lines] if line.startswith("data: {")]
    choices = [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames]
    assert choices[-1]["finish_reason"] == "length"
    assert "".join(choice["text"] for choice in choices) == " x" * 40
    assert process.exit_code() == 0
    assert "Traceback" not in "".join(process.lines)


def test_a_second_signal_ends_it_at_once():
    port = free_port()
    process = Process(f"--port={port}", "--drain_timeout_s=60")
    process.wait_for("curl")
    with pytest.raises(httpx.TransportError):
        with httpx.stream(
            "POST",
            f"http://127.0.0.1:{port}/v1/completions",
            json={"prompt": "a", "max_tokens": 250, "stream": True},
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.popen.send_signal(signal.SIGTERM)
            process.wait_for("Draining")
            process.popen.send_signal(signal.SIGINT)
            list(lines)
    assert process.exit_code() == 128 + signal.SIGINT


def test_a_signal_while_loading_ends_it():
    process = Process(f"--port={free_port()}", load_s=60)
    process.wait_for("Loading weights")
    process.popen.send_signal(signal.SIGTERM)
    assert process.exit_code() == 0


def test_what_cannot_be_served_is_one_line():
    process = Process("bad", f"--port={free_port()}")
    assert process.exit_code() == 1
    assert process.lines[-1] == "error: bad has no config.json\n"
    assert "Traceback" not in "".join(process.lines)


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = Process(f"--port={port}")
        assert process.exit_code() == 1
    assert process.lines == [
        f"error: Cannot listen on 127.0.0.1:{port}: Address already in use. "
        "Choose another --port or --host.\n"
    ]


def test_a_public_address_without_a_key_is_warned_about():
    for arguments, warned in (((), True), (("--api_key=k",), False)):
        process = Process("--host=0.0.0.0", f"--port={free_port()}", *arguments)
        process.wait_for("curl")
        process.popen.send_signal(signal.SIGTERM)
        assert process.exit_code() == 0
        assert any("without --api_key" in line for line in process.lines) == warned


def test_vllms_spellings(tmp_path):
    (tmp_path / "server.flags").write_text("# a comment\n--max-num-seqs=7\n--page_size=32\n")
    values = parse(
        [
            "serve",
            "some/model",
            "--gpu-memory-utilization=0.5",
            "--block-size",
            "8",
            "--no-enable-prefix-caching",
            "--max_model_len=100",
            f"--flagfile={tmp_path / 'server.flags'}",
            "--served-model-name=a,b",
            "--api-key=x,y",
            "--api-key=z",
        ]
    )
    assert values is not None
    options = engine_options(values)
    assert (options.model, options.hbm_utilization, options.page_size) == ("some/model", 0.5, 32)
    assert (options.max_num_seqs, options.max_model_len) == (7, 100)
    assert options.enable_prefix_caching is False and options.max_num_batched_tokens is None
    server = server_options_of(values)
    assert server.served_model_names == ("a", "b") and server.api_keys == ("x", "y", "z")


def test_defaults(monkeypatch):
    monkeypatch.setenv("XLINFER_API_KEY", "from-environment")
    values = parse(["serve"])
    assert values is not None and (values.host, values.port) == ("127.0.0.1", 8000)
    assert str(engine_options(values).model).endswith("demo")
    server = server_options_of(values)
    assert server.api_keys == ("from-environment",) and server.model_root == "pystd-8m"
    assert server.max_request_bytes == 32 * 2**20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prot=1"], "Did you mean: port"),
        (["--port=70000"], "port"),
        (["--port=x"], "port"),
        (["--dtype=int3"], "float32"),
        (["--hbm_utilization=1.5"], "hbm_utilization"),
        (["--tensor-parallel-size=0"], "tensor_parallel_size"),
        (["a", "b"], "Only one model"),
        (["a", "--model=b"], "Only one model"),
        (["--flagfile=/does/not/exist"], "exist"),
    ],
)
def test_bad_command_lines(arguments, said):
    with pytest.raises(UsageError, match=said):
        parse(["serve", *arguments])


def test_help_names_every_flag_with_its_default():
    text = help_text()
    assert parse(["serve", "--help"]) is None
    for name in ("model", "port", "max_num_seqs", "api_key", "[no]strict_fields"):
        assert f"  --{name}\n" in text
    assert "(default: 8000)" in text and "flagfile" in text


def test_plain_progress_does_not_flood():
    stream = io.StringIO()
    with show_progress(stream) as progress:
        for done in range(1001):
            progress("load", done * 2**20, 1000 * 2**20)
        progress("compile", 1, 1)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[0] == "Loading weights: 0/1,000 MiB"
    assert lines[5] == "Loading weights: 500/1,000 MiB, 0 s left"
    assert lines[10].startswith("Loading weights: 1,000/1,000 MiB in 0.")
    assert lines[11].startswith("Compiling: 1/1 in 0.0 s")
    empty = io.StringIO()
    plain_progress(empty)("load", 0, 0)
    assert empty.getvalue().startswith("Loading weights: 0/0 MiB")


def test_bars_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with show_progress(stream) as progress:
        progress("compile", 1, 4)
        progress("compile", 4, 4)
    assert "Compiling" in stream.getvalue() and "4/4" in stream.getvalue()


def test_a_compile_cache_others_can_write_to_is_refused(tmp_path):
    (tmp_path / "shared").mkdir()
    os.chmod(tmp_path / "shared", 0o777)
    with pytest.raises(ValueError, match="writable by nobody else"):
        Store(tmp_path / "shared")
