"""The engine in its own thread, and the event loop's side of it.

Only the thread calls the engine. Orders reach it through an inbox under a condition variable;
the outputs of a step come back in one `call_soon_threadsafe`, whatever the number of requests.
Everything with a leading `# loop` comment belongs to the event loop's thread.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic

from xlinfer.request import EngineStats, InvalidRequest, Request, TokenOutput
from xlinfer.serve.build import Built, TokenEngine
from xlinfer.serve.errors import ServingError
from xlinfer.serve.metrics import Metrics
from xlinfer.serve.subscription import Subscription
from xlinfer.serve.text import TextRequest

logger = logging.getLogger(__name__)

HANG_S = 300.0  # a step that takes longer than this is a hang: /health says so


@dataclass(frozen=True)
class _Add:
    requests: tuple[Request, ...]
    accepted: asyncio.Future


@dataclass(frozen=True)
class _Abort:
    request_ids: tuple[str, ...]


@dataclass(frozen=True)
class _Stop:
    pass


class EngineThread:
    """`start` builds the engine in the thread; `ready` holds what was built, or why not."""

    def __init__(
        self,
        make: Callable[[], Built],
        metrics: Metrics,
        *,
        max_queued_requests: int,
        max_queued_tokens: int,
    ):
        self._make, self._metrics = make, metrics
        self._max_queued_requests, self._max_queued_tokens = max_queued_requests, max_queued_tokens
        self._wake = threading.Condition()
        self._inbox: list[_Add | _Abort | _Stop] = []
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._busy_since: float | None = None  # written by the thread; None while it is idle
        # loop
        self._open: dict[str, Subscription] = {}  # by sequence id; gone once it has ended
        self._unanswered: set[asyncio.Future] = set()  # submissions the thread has not judged
        self._closed = asyncio.Event()
        self._closed.set()
        self._error: Exception | None = None
        self.draining = False

    # loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Built] = self._loop.create_future()
        self._thread.start()

    def trouble(self) -> str | None:
        """Why requests cannot be served, or None. Never waits and never asks the device."""
        if self._error is not None:
            return "The engine has failed."
        if not self.ready.done() or self.ready.exception() is not None:
            return "The model is loading."
        busy_since = self._busy_since
        if busy_since is not None and monotonic() - busy_since > HANG_S:
            return f"The engine has not finished a step for {HANG_S:.0f} s."
        return "The server is shutting down." if self.draining else None

    def check_room(self, sequences: int, prompt_tokens: int = 0) -> None:
        """Raises ServingError: 503 when not serving, 429 when the queue would be over its limits.

        More sequences than can run are queued; tokens count until a prompt's first answer.
        """
        if self._error is not None:
            raise ServingError(500, "The engine has failed.")
        if (trouble := self.trouble()) is not None:
            raise ServingError(503, trouble, retry_after=5)
        running = self.ready.result().engine.max_running
        queued = len(self._open) + sequences - running
        waiting = {id(sub): sub.prompt_tokens for sub in self._open.values() if not sub.started}
        tokens = sum(waiting.values())
        if queued > self._max_queued_requests:
            self._metrics.reject("requests")
        elif tokens and tokens + prompt_tokens > self._max_queued_tokens:
            self._metrics.reject("tokens")
        else:
            return
        seconds = tokens / self._metrics.tokens_per_s if self._metrics.tokens_per_s else 1.0
        raise ServingError(
            429,
            f"The queue is full: {max(0, len(self._open) - running)} sequences wait, with {tokens} "
            "prompt tokens. Try again later.",
            retry_after=min(60, max(1, round(seconds))),
        )

    async def submit(self, text: TextRequest, *, stream: bool) -> Subscription:
        """Hand over all sequences of `text`. Raises InvalidRequest as the engine does, and
        ServingError; then nothing of it runs. Every subscription must be closed."""
        self.check_room(len(text.requests), len(text.prompt_token_ids))
        subscription = Subscription(text, stream=stream)
        for request in text.requests:
            self._open[request.request_id] = subscription
        self._closed.clear()
        accepted = self._loop.create_future()
        self._unanswered.add(accepted)
        try:
            self._send(_Add(tuple(text.requests), accepted))
            await accepted
        except BaseException:
            self.close(subscription)
            raise
        finally:
            self._unanswered.discard(accepted)
        return subscription

    def close(self, subscription: Subscription) -> None:
        """Nobody waits for it any more: what still runs is aborted."""
        text = subscription.text
        ids = [request.request_id for request in text.requests if request.request_id in self._open]
        self._forget(ids)
        if ids and self._error is None:
            self._metrics.abort(len(ids))
            self._send(_Abort(tuple(ids)))

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work, let what runs finish, and end what has not after `timeout_s`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._closed.wait(), timeout_s)
        except TimeoutError:
            error = ServingError(503, "The server shut down before the answer was complete.")
            for subscription in set(self._open.values()):
                self.close(subscription)
                subscription.fail(error)

    def stop(self) -> None:
        """The thread ends after its current step."""
        self._send(_Stop())

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _send(self, order: _Add | _Abort | _Stop) -> None:
        with self._wake:
            self._inbox.append(order)
            self._wake.notify()

    def _deliver(self, outputs: list[TokenOutput], stats: EngineStats) -> None:
        self._metrics.step(stats)
        stopped = []
        for output in outputs:
            subscription = self._open.get(output.request_id)
            if subscription is None:
                continue  # aborted while its last step was on the device
            try:
                stop = subscription.add(output, self._metrics)
            except Exception as error:  # a fault in one request's text ends that request only
                logger.exception("request %s failed", subscription.text.request_id)
                self.close(subscription)
                subscription.fail(error)
                continue
            if stop:
                stopped.append(output.request_id)
            if stop or output.finish_reason is not None:
                self._forget([output.request_id])
        if stopped:
            self._send(_Abort(tuple(stopped)))

    def _use(self, built: Built) -> None:
        self._metrics.use_plan(built.engine.plan)
        _settle(self.ready, built)

    def _die(self, error: Exception) -> None:
        self._error = error
        for subscription in set(self._open.values()):
            subscription.fail(ServingError(500, "The engine has failed."))
        self._forget(list(self._open))
        for accepted in self._unanswered:
            _settle(accepted, ServingError(500, "The engine has failed."))

    def _forget(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._open.pop(id, None)
        if not self._open:
            self._closed.set()

    # thread

    def _main(self) -> None:
        try:
            built = self._make()
        except BaseException as error:
            self._call(_settle, self.ready, error)
            return
        self._call(self._use, built)
        try:
            self._serve(built.engine)
        except Exception as error:
            logger.exception("the engine has failed")
            self._call(self._die, error)

    def _serve(self, engine: TokenEngine) -> None:
        while True:
            with self._wake:
                while not self._inbox and not engine.has_work:
                    self._busy_since = None
                    self._wake.wait()
                orders, self._inbox = self._inbox, []
            self._busy_since = monotonic()
            if any(isinstance(order, _Stop) for order in orders):
                return
            for order in orders:
                self._obey(engine, order)
            if not engine.has_work:
                # All was aborted: the gauges would otherwise show the state before.
                self._call(self._deliver, [], engine.stats())
            else:
                outputs = engine.step()
                self._call(self._deliver, outputs, engine.stats())

    def _obey(self, engine: TokenEngine, order: _Add | _Abort | _Stop) -> None:
        if isinstance(order, _Abort):
            engine.abort(order.request_ids)
        elif isinstance(order, _Add):
            answer = None
            for n, request in enumerate(order.requests):
                try:
                    engine.add_request(request)
                except Exception as error:  # whatever is wrong is wrong with this request only
                    if not isinstance(error, InvalidRequest):
                        logger.exception("the engine failed to take a request")
                    engine.abort([request.request_id for request in order.requests[:n]])
                    answer = error
                    break
            self._call(_settle, order.accepted, answer)

    def _call(self, function: Callable, *args) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # the loop has been closed: the process is ending


def _settle(future: asyncio.Future, result: object) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
