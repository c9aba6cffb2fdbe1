"""One HTTP request's prompts in the engine, and how its answers leave: whole or as events."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xlinfer.serve.engine_thread import EngineThread
from xlinfer.serve.errors import json_bytes, serving_error
from xlinfer.serve.subscription import Subscription
from xlinfer.serve.text import Delta, TextRequest

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client hung up: nobody reads what would be answered."""


class Job:
    """Must be closed; closing aborts what still runs."""

    def __init__(self, engine: EngineThread, subscriptions: Sequence[Subscription]):
        self._engine, self._subscriptions = engine, subscriptions
        self.texts = [subscription.text for subscription in subscriptions]

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """(prompt number, delta), as many together as are there, until all answers have ended."""
        if len(self._subscriptions) == 1:
            while deltas := await self._subscriptions[0].next():
                yield [(0, delta) for delta in deltas]
            return
        tasks = {
            asyncio.ensure_future(subscription.next()): number
            for number, subscription in enumerate(self._subscriptions)
        }
        try:
            while tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                news = []
                for task in done:
                    number = tasks.pop(task)
                    if deltas := task.result():
                        news += [(number, delta) for delta in deltas]
                        again = asyncio.ensure_future(self._subscriptions[number].next())
                        tasks[again] = number
                if news:
                    yield news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def finished(self) -> list[TextRequest]:
        return [await subscription.finished() for subscription in self._subscriptions]

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._engine.close(subscription)


async def start_job(engine: EngineThread, texts: Sequence[TextRequest], *, stream: bool) -> Job:
    """All of `texts` or, if one is refused, none. Raises InvalidRequest and ServingError."""
    engine.check_room(
        sum(len(text.requests) for text in texts), sum(len(text.prompt_token_ids) for text in texts)
    )
    subscriptions = []
    try:
        for text in texts:
            subscriptions.append(await engine.submit(text, stream=stream))
    except BaseException:
        Job(engine, subscriptions).close()
        raise
    return Job(engine, subscriptions)


async def unless_gone[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client hangs up. Raises ClientGone."""
    return await _race(request.receive, work)


class EventStream(Response):
    """Server-sent events: frames as they come, an error event if they fail, then [DONE].

    `close` is called however it ends.
    """

    def __init__(self, frames: AsyncIterator[bytes], *, close: Callable[[], None]):
        super().__init__(media_type="text/event-stream")
        # Proxies must pass events on as they come.
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames, self._close = frames, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _race(receive, self._send(scope, send))
        except ClientGone:
            pass
        finally:
            self._close()

    async def _send(self, scope: Scope, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for frame in self._frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except Exception as error:
            known = serving_error(error, scope["xlinfer.request_id"])
            if known is not error and known.status == 500:
                logger.exception("request %s failed", scope["xlinfer.request_id"])
            await send(
                {"type": "http.response.body", "body": event(known.body()), "more_body": True}
            )
        await send({"type": "http.response.body", "body": DONE})


def event(value: object) -> bytes:
    return b"data: " + json_bytes(value) + b"\n\n"


async def _race[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        # Cancelled work must have let go before its caller goes on.
        await asyncio.gather(working, gone, return_exceptions=True)
