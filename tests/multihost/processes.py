"""Servers of several processes on this machine, and a checkpoint that divides among them."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file

from xlinfer.multihost.cluster import free_port

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests" / "data" / "tokenizer"
SIZES: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 128, "max_num_batched_tokens": 32}
VOCAB, HIDDEN, HEADS, HEAD_DIM, FFW, LAYERS = 160, 24, 6, 4, 48, 2
HEARTBEAT_S = 6.0


def write_checkpoint(folder: Path) -> Path:
    """A Llama with 6 heads of random weights."""
    rng, wide = np.random.default_rng(0), HEADS * HEAD_DIM
    one = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)
    tensors = {
        "model.embed_tokens.weight": one(VOCAB, HIDDEN),
        "lm_head.weight": one(VOCAB, HIDDEN),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        tensors |= {
            **{f"{at}self_attn.{x}_proj.weight": one(wide, HIDDEN) for x in "qkv"},
            f"{at}self_attn.o_proj.weight": one(HIDDEN, wide),
            f"{at}mlp.gate_proj.weight": one(FFW, HIDDEN),
            f"{at}mlp.up_proj.weight": one(FFW, HIDDEN),
            f"{at}mlp.down_proj.weight": one(HIDDEN, FFW),
            f"{at}input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{at}post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
        }
    config = json.loads((ROOT / "tests/data/goldens/llama/config.json").read_text())
    config |= {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "intermediate_size": FFW,
        "num_hidden_layers": LAYERS,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


# The server's own entry; a test that is killed leaves none behind (PR_SET_PDEATHSIG is 1).
PROGRAM = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
runpy.run_module("xlinfer.serve", run_name="__main__", alter_sys=True)
"""


class Server:
    """One rank."""

    def __init__(self, arguments: list[str]):
        one = "--xla_force_host_platform_device_count=1"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one},
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

    def exit_code(self, timeout_s: float) -> int:
        code = self.popen.wait(timeout_s)
        self._reader.join(5)
        return code

    def said(self) -> str:
        return "".join(self.lines)


class Servers:
    """All ranks of a group, one device each; none is left when the block ends. `more` are further
    arguments of all, `last` of the last rank."""

    def __init__(self, checkpoint: Path, cache: Path, count: int, *more: str, last: str = ""):
        port, self.ports = free_port(), [free_port() for _ in range(count)]
        same = [
            str(checkpoint), f"--tokenizer={TOKENIZER}", f"--compile_cache_dir={cache}",
            f"--tensor_parallel_size={count}", f"--coordinator_address=127.0.0.1:{port}",
            f"--num_processes={count}", f"--heartbeat_timeout_s={HEARTBEAT_S}",
            *(f"--{name}={value}" for name, value in SIZES.items()), *more,
        ]  # fmt: skip
        own = [[f"--process_id={n}", f"--port={port}"] for n, port in enumerate(self.ports)]
        own[-1] += [last] if last else []
        self.ranks = [Server([*same, *arguments]) for arguments in own]
        self.url = f"http://127.0.0.1:{self.ports[0]}"

    def wait_until_ready(self, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while "Ready in" not in self.ranks[0].said():
            ended = [rank.said() for rank in self.ranks if rank.popen.poll() is not None]
            assert not ended and time.monotonic() < deadline, ended or self.ranks[0].said()
            time.sleep(0.05)

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_) -> None:
        for rank in self.ranks:
            rank.popen.kill()
            rank.popen.wait()


def answer(url: str, body: dict, begun: Callable[[], None] = lambda: None) -> list[int]:
    """The tokens of a streamed completion; calls `begun()` at its first."""
    tokens: list[int] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as stream:
        assert stream.status_code == 200, stream.read()
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "choices" in event, event
                new = event["choices"][0].get("token_ids") or []
                if new and not tokens:
                    begun()
                tokens += new
    return tokens


def bodies(count: int, seed: int = 0) -> list[dict]:
    """Requests of all sorts: short and long, greedy and sampled, with penalties and a bias."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        body = {
            "prompt": rng.integers(3, VOCAB, rng.integers(1, 60)).tolist(),
            "max_tokens": int(rng.integers(1, 40)),
            "temperature": 0.0,
            "ignore_eos": bool(n % 2),
            "stream": True,
            "return_token_ids": True,
        }
        if n % 3 == 1:
            body |= {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": n}
        if n % 5 == 2:
            body |= {"presence_penalty": 0.5, "logit_bias": {"7": 2.0}}
        made.append(body)
    return made


def listening(pid: int) -> set[str]:
    """The addresses that a process listens on, as /proc says."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:  # LISTEN
                found.add(_address(fields[1].partition(":")[0]))
    return found


def _address(digits: str) -> str:
    """/proc's hexadecimal, four bytes at a time in the host's order."""
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    data = b"".join(words)
    if data.startswith(bytes(10) + b"\xff\xff"):  # IPv4 in IPv6
        data = data[12:]
    return ".".join(map(str, data)) if len(data) == 4 else data.hex(":", 2)
