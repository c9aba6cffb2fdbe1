"""Lines of an OpenAI Batch file, answered by the server's own application without a socket.

A line that is refused has a result too: the status and the error that the server would answer.
"""

import asyncio
import json
import queue
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from starlette.types import ASGIApp

from xlinfer.score.options import TaskOptions
from xlinfer.score.rows import BadRow, Row, Scored, Scorer
from xlinfer.serve.app import create_app
from xlinfer.serve.build import Built
from xlinfer.serve.errors import json_bytes
from xlinfer.serve.lifecycle import new_server
from xlinfer.serve.server import ServerOptions

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
QUEUED = 4  # lines at once for each row of a step
ENDLESS = 2**62


def openai_batch(built: Built, options: TaskOptions) -> Scorer:
    return lambda rows: _answers(built, options, rows)


def _answers(built: Built, options: TaskOptions, rows: Iterable[Row]) -> Iterator[Scored]:
    """The event loop has a thread of its own; rows are read in the caller's."""
    done: queue.SimpleQueue[Scored | BaseException] = queue.SimpleQueue()
    rows, running, most = iter(rows), 0, QUEUED * built.engine.max_running
    desk = _Desk(built, options, done)
    try:
        while True:
            while running < most and (row := next(rows, None)) is not None:
                desk.ask(row)
                running += 1
            if not running:
                return
            answer = done.get()
            if isinstance(answer, BaseException):
                raise answer
            running -= 1
            yield answer
    finally:
        desk.close()


class _Desk:
    """The server's application, on a loop in a thread. What it answers goes into `done`."""

    def __init__(self, built: Built, options: TaskOptions, done: queue.SimpleQueue):
        self._built, self._options, self._done = built, options, done
        self._loop = asyncio.new_event_loop()
        self._stop, self._tasks = asyncio.Event(), set[asyncio.Task]()
        started = Future[None]()
        self._thread = threading.Thread(target=self._main, args=(started,), name="batch")
        self._thread.start()
        started.result()

    def ask(self, row: Row) -> None:
        self._loop.call_soon_threadsafe(self._begin, row)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def _main(self, started: Future[None]) -> None:
        try:
            self._loop.run_until_complete(self._serve(started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, started: Future[None]) -> None:
        names = self._options.served_model_names
        server = new_server(
            ServerOptions(
                model_root="batch",
                served_model_names=names or ("model",),
                created=int(time.time()),
                pooling=self._options.pooling,
                max_queued_requests=ENDLESS,
                max_queued_tokens=ENDLESS,
                max_request_bytes=ENDLESS,
            ),
            lambda: self._built,
        )
        self._server, self._app = server, create_app(server)
        server.engine.start()
        await server.engine.ready
        started.set_result(None)
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._built.engine.has_work and not server.engine.join(0):
            await asyncio.sleep(0.001)  # what was aborted leaves it
        server.engine.stop()
        while not server.engine.join(0):
            await asyncio.sleep(0.001)

    def _begin(self, row: Row) -> None:
        task = self._loop.create_task(self._answer(row))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, row: Row) -> None:
        try:
            self._done.put(await self._scored(row))
        except Exception as error:  # not of this row: the server answers those
            self._done.put(error)

    async def _scored(self, row: Row) -> Scored:
        line: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}"}
        line |= {"custom_id": row.values.get("custom_id"), "response": None, "error": None}
        if (error := _refusal(row)) is not None:
            return Scored(row, {**line, "error": error}, 0)
        body = dict(row.values["body"])
        named = None if self._options.served_model_names else body.pop("model", None)
        status, headers, answer = await _post(self._app, row.values["url"], json_bytes(body))
        if status >= 500:
            message = answer["error"]["message"]
            if (trouble := self._server.engine.trouble()) is not None:
                raise RuntimeError(f"{trouble} At {row.id}: {message}")
            return Scored(row, BadRow(message), 0)
        if named is not None and "model" in answer:
            answer["model"] = named
        line["response"] = {
            "status_code": status,
            "request_id": headers["x-request-id"],
            "body": answer,
        }
        return Scored(row, line, _computed(answer.get("usage") or {}))


def _refusal(row: Row) -> dict | None:
    """Why the server is not asked at all, in OpenAI's form."""
    method, url, body = (row.values.get(name) for name in ("method", "url", "body"))
    if method != "POST":
        return {"code": "invalid_method", "message": f"method must be POST, got {method!r}"}
    if url not in URLS:
        return {
            "code": "invalid_url",
            "message": f"url must be one of {', '.join(URLS)}, got {url!r}",
        }
    if not isinstance(body, dict):
        return {"code": "invalid_body", "message": f"body must be an object, got {body!r}"}
    if body.get("stream"):
        return {"code": "invalid_body", "message": "stream: a batch's answers are whole"}
    return None


def _computed(usage: dict) -> int:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return usage.get("total_tokens", 0) - cached


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[str, str], dict]:
    """Status, headers and JSON of a POST to `app`."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
        "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "",
        "query_string": b"", "headers": [(b"content-type", b"application/json")],
        "client": None, "server": None,
    }  # fmt: skip
    sent: list[dict[str, Any]] = []
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # nobody hangs up

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)  # type: ignore[arg-type]
    start, *parts = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, json.loads(b"".join(part["body"] for part in parts))
