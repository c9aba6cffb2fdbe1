"""Process start to first token of `python -m xlinfer.serve` with the demo model.

Cold: an empty compile cache. Warm: the same cache again. A client polls until it is answered.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

BODY = json.dumps({"prompt": "def main(", "max_tokens": 1, "temperature": 0})
LIMIT_S = 180


def main() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        os.chmod(cache, 0o700)
        cold = first_token_s(cache)
        warm = [first_token_s(cache) for _ in range(3)]
    return {"cold_s": cold, "warm_s": sorted(warm)[1]}


def first_token_s(cache: str) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "xlinfer.serve", f"--port={port}"]
    started = time.perf_counter()
    server = subprocess.Popen(
        [*command, f"--compile_cache_dir={cache}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not answered(port):
            if server.poll() is not None or time.perf_counter() - started > LIMIT_S:
                raise RuntimeError(f"the server gave no token (exit code {server.poll()})")
            time.sleep(0.02)
        return time.perf_counter() - started
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def answered(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("POST", "/v1/completions", BODY, {"content-type": "application/json"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
