"""A server process from its first line to its exit code.

The socket listens at once; the model loads in the engine's thread; SIGTERM or SIGINT drains, and
a second one ends the process where it stands.
"""

import asyncio
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import uvicorn
from starlette.types import ASGIApp

from xlinfer.serve.app import create_app
from xlinfer.serve.build import Built
from xlinfer.serve.engine_thread import EngineThread
from xlinfer.serve.metrics import Metrics
from xlinfer.serve.server import Server, ServerOptions

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 2**10
KEEP_ALIVE_S = 30
LAST_WORDS_S = 5  # for responses still being written when the drain is over
STEP_S = 10  # for the engine's last step
SIGNALS = signal.SIGTERM, signal.SIGINT


def listen(host: str, port: int) -> socket.socket:
    """Raises OSError with a sentence for people."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        message = f"Cannot listen on {host}:{port}: {reason}. Choose another --port or --host."
        raise OSError(message) from None


def new_server(options: ServerOptions, make: Callable[[], Built]) -> Server:
    metrics = Metrics(options.served_model_names[0])
    engine = EngineThread(
        make,
        metrics,
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
    )
    return Server(options=options, engine=engine, metrics=metrics)


def new_http(server: Server) -> uvicorn.Server:
    return http_server(create_app(server))


def http_server(app: ASGIApp) -> uvicorn.Server:
    """h11, because the other parser that uvicorn knows takes headers of any size."""
    return _Http(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_WORDS_S,
        )
    )


async def run(
    server: Server,
    listener: socket.socket,
    *,
    drain_timeout_s: float,
    when_asked_to_stop: Callable[[Callable[[], None]], None] = lambda stop: None,
) -> int:
    """Serve until a signal, or until what `when_asked_to_stop` is given is called, by any thread.
    The exit code: 0 after a drain, 1 if the model cannot be served."""
    start, loop = monotonic(), asyncio.get_running_loop()
    stop = asyncio.Event()
    on_signals(loop, stop.set)

    def stop_from_thread() -> None:
        loop.call_soon_threadsafe(stop.set)

    when_asked_to_stop(stop_from_thread)
    http = new_http(server)
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    server.engine.start()
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait(
        {server.engine.ready, stopping, serving}, return_when=asyncio.FIRST_COMPLETED
    )
    code = 0
    if server.engine.ready.done() and (error := server.engine.ready.exception()) is not None:
        explain(error)
        code = 1
    elif not stop.is_set():
        _announce(server, listener, monotonic() - start)
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    if code == 0:
        logger.info("Draining: running answers have %.0f s to finish.", drain_timeout_s)
        await server.engine.drain(drain_timeout_s)
    http.should_exit = True
    await serving
    server.engine.stop()
    stopping.cancel()
    return code


def end(server: Server, code: int) -> None:
    """Leave the process. A thread that is still inside a load or a step cannot be waited for, and
    tearing the interpreter down under it could crash: then it ends without that."""
    if server.engine.join(STEP_S if server.engine.ready.done() else 0):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def on_signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
    """`stop()` at the first SIGTERM or SIGINT; the second ends the process."""
    heard = False

    def hear(number: int) -> None:
        nonlocal heard
        if heard:
            os._exit(128 + number)
        heard = True
        stop()

    for number in SIGNALS:
        loop.add_signal_handler(number, hear, number)


def explain(error: BaseException) -> None:
    """One line for what the user can mend; a traceback for what only we can."""
    if isinstance(error, ValueError | OSError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        logger.error("The model could not be loaded.", exc_info=error)


def _announce(server: Server, listener: socket.socket, seconds: float) -> None:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    url, name = f"http://{host}:{port}", server.options.served_model_names[0]
    most, longest = server.max_running, server.plan.max_model_len
    print(
        f"Ready in {seconds:.1f} s: {name} at {url}/v1 "
        f"({most} sequences of up to {longest} tokens). Try:",
        file=sys.stderr,
    )
    body = f'{{"model": "{name}", "prompt": "def fibonacci(n):", "max_tokens": 64}}'
    key = " -H 'Authorization: Bearer KEY'" if server.options.api_keys else ""
    json_type = " -H 'Content-Type: application/json'"
    line = f"curl {url}/v1/completions{key}{json_type} -d {shlex.quote(body)}"
    print(f"  {line}", file=sys.stderr, flush=True)


class _Http(uvicorn.Server):
    """Signals are `run`'s: uvicorn would stop listening at the first one and raise it again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
