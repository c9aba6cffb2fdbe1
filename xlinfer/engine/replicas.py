"""Several engines of one model as one: data parallelism without collectives.

Replicas share nothing, so a request runs in one of them from its prompt to its end, with the bits
that it would have alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from xlinfer.engine.engine import Engine
from xlinfer.engine.placement import Placement
from xlinfer.plan import Plan
from xlinfer.request import EngineStats, InvalidRequest, Request, TokenOutput


class Replicas:
    """Has the members of `Engine`. Not thread-safe.

    The engines must have one plan; they are this object's from here on.
    """

    def __init__(self, engines: Sequence[Engine], *, enable_prefix_caching: bool):
        plan = engines[0].plan
        assert all(engine.plan == plan for engine in engines), "replicas of one model have one plan"
        self.engines = tuple(engines)
        self._dispatched: list[Engine] = []  # of each step in flight, the oldest first
        self._placement = Placement(
            len(engines), page_size=plan.page_size, num_pages=plan.num_pages,
            prefix_caching=enable_prefix_caching,
        )  # fmt: skip

    @property
    def plan(self) -> Plan:
        """Of each replica."""
        return self.engines[0].plan

    @property
    def vocab_size(self) -> int:
        return self.engines[0].vocab_size

    @property
    def max_running(self) -> int:
        return sum(engine.max_running for engine in self.engines)

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    def add_request(self, request: Request) -> None:
        """As `Engine.add_request`."""
        if self._placement.replica_of(request.request_id) is not None:
            message = f"The request id {request.request_id!r} is in use."
            raise InvalidRequest("request_id", message)
        engine = self.engines[self._placement.place(request)]
        try:
            engine.add_request(request)
        except BaseException:
            self._placement.ended(request.request_id)
            raise

    def abort(self, request_ids: Iterable[str]) -> None:
        """As `Engine.abort`."""
        for request_id in request_ids:
            if (replica := self._placement.replica_of(request_id)) is not None:
                self.engines[replica].abort([request_id])
                self._placement.ended(request_id)

    def step(self) -> list[TokenOutput]:
        """Give every replica its next steps, and return what those that are done gave; waits for
        the one that was dispatched first where none is."""
        for engine in self.engines:
            self._dispatched.extend([engine] * engine.dispatch())
        done = [engine for engine in self.engines if engine.is_ready] or self._dispatched[:1]
        outputs = []
        for engine in done:
            if engine in self._dispatched:
                self._dispatched.remove(engine)
            outputs += engine.receive()
        for output in outputs:
            if output.finish_reason is not None:
                self._placement.ended(output.request_id)
            elif output.token_ids:
                self._placement.answering(output.request_id)
        return outputs

    def stats(self) -> EngineStats:
        """Sums; the cache's usage is the mean."""
        each = [engine.stats() for engine in self.engines]
        sums = {f.name: sum(getattr(one, f.name) for one in each) for f in fields(EngineStats)}
        return EngineStats(**{**sums, "kv_cache_usage": sums["kv_cache_usage"] / len(each)})

    def update_weights(self, params: Any) -> None:
        """As `Engine.update_weights`, of every replica."""
        for engine in self.engines:
            engine.update_weights(params)
        self._dispatched.clear()  # an engine takes in what is in flight before it changes

    def reset_prefix_cache(self) -> None:
        for engine in self.engines:
            engine.reset_prefix_cache()

    def check(self) -> None:
        for engine in self.engines:
            engine.check()
