"""One request's answers on their way to one client."""

import asyncio
from collections.abc import Sequence
from time import monotonic

from xlinfer.request import TokenOutput
from xlinfer.serve.metrics import Metrics, RequestTimes
from xlinfer.serve.text import Delta, TextRequest


class Subscription:
    """Deltas wait here until they are asked for; those that a slow client leaves waiting are
    merged, so that they never take more than the answer itself does. Event loop only."""

    def __init__(self, text: TextRequest, *, stream: bool):
        self.text = text
        self.prompt_tokens = len(text.prompt_token_ids)
        self.times = RequestTimes(arrival=monotonic())
        self._stream = stream  # else deltas are dropped: the whole is asked for at the end
        self._waiting: dict[int, list[Delta]] = {}
        self._news = asyncio.Event()
        self._error: Exception | None = None

    @property
    def started(self) -> bool:
        return self.times.first_token is not None

    def add(self, output: TokenOutput, metrics: Metrics) -> bool:
        """Whether the engine must abort the sequence: a stop string ended it."""
        delta, stop = self.text.add(output)
        metrics.tokens(self.times, delta.index, len(delta.token_ids))
        if delta.finish_reason is not None:
            answer = self.text.answers[delta.index]
            metrics.sequence_finished(self.times, answer, self.text)
        if self._stream:
            self._waiting.setdefault(delta.index, []).append(delta)
            self._news.set()
        elif self.text.finished:
            self._news.set()
        return stop

    def fail(self, error: Exception) -> None:
        self._error = error
        self._news.set()

    async def next(self) -> list[Delta]:
        """What is new, one delta an answer; [] once all answers have ended. Raises the failure."""
        while not self._waiting and self._error is None and not self.text.finished:
            self._news.clear()
            await self._news.wait()
        waiting, self._waiting = self._waiting, {}
        if not waiting and self._error is not None:
            raise self._error
        return [_merged(deltas) for deltas in waiting.values()]

    async def finished(self) -> TextRequest:
        """Waits for the end of all answers. Raises the failure."""
        while await self.next():
            pass
        return self.text


def _merged(deltas: Sequence[Delta]) -> Delta:
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    logprobs = None
    if last.logprobs is not None:
        logprobs = [position for delta in deltas for position in delta.logprobs or ()]
    return Delta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[id for delta in deltas for id in delta.token_ids],
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
