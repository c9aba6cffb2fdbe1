"""Shards as tasks of Ray actors, each of which builds its engine once.

Ray places and restarts actors; a shard whose actor is lost goes to whichever is free next. A lost
actor may have been near the end: its log is there, and should it still run, one commit counts.
"""

import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from xlinfer.score.inputs import InputError
from xlinfer.score.job import raise_failures
from xlinfer.score.layout import MANIFEST, Attempt
from xlinfer.score.manifest import JobError, Manifest
from xlinfer.score.shard import Commit, Interrupted, ShardRunner, Worker
from xlinfer.score.signals import SIGNALS
from xlinfer.score.store import open_store

logger = logging.getLogger("xlinfer.score")
TRIES = 3  # of a shard whose actor is lost or fails: it may be the shard's fault
POLL_S = 0.5
STOP_S = 7.0  # in which actors say that they have stopped
CALLS = 4  # of an actor at once: run, and what is asked meanwhile


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    address: str | None  # of a cluster; None: the one around, or a new one on this machine
    num_actors: int
    resources: Mapping[str, float]  # of each actor, by Ray's names: TPU, GPU, CPU or one's own


class _Actor:
    """In a process of Ray's. `stop` and `counts` are answered while `run` is at work."""

    def __init__(self, url: str, make: Callable[[], Worker]):
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._counts = Counter[str]()
        store = open_store(url)
        self._runner = ShardRunner(
            store=store,
            manifest=Manifest.from_json(store.read(MANIFEST)),
            worker=make(),
            stop=self._stop,
            on_row=self._count,
        )

    def ready(self) -> int:
        return os.getpid()

    def run(self, attempt: Attempt) -> Commit | str | None:
        """None: it was told to stop; a text: why the shard's input cannot be read."""
        try:
            return self._runner.run(attempt)
        except Interrupted:
            return None
        except InputError as error:
            return str(error)

    def stop(self) -> None:
        self._stop.set()

    def counts(self) -> Counter[str]:
        """Since the last call: rows, failed, tokens."""
        with self._lock:
            counts, self._counts = self._counts, Counter[str]()
        return counts

    def _count(self, ok: bool, tokens: int) -> None:
        with self._lock:
            self._counts.update(rows=1, failed=not ok, tokens=tokens)


def run_on_ray(
    options: RayOptions,
    url: str,
    make: Callable[[], Worker],
    attempts: Sequence[Attempt],
    *,
    stop: threading.Event,
    on_rows: Callable[[int, int, int], None],
    on_commit: Callable[[Commit], None],
) -> None:
    """`make` builds an actor's engine, and `url` is a store that all actors reach. `on_rows` takes
    rows, failed ones among them, and tokens. Raises Interrupted, JobError when shards are left."""
    ray = _ray()
    _connect(ray, options)
    try:
        pool = _Pool(ray=ray, waiting=deque(attempts), on_rows=on_rows, on_commit=on_commit)
        kind = _actor_kind(ray, options)
        for _ in range(min(options.num_actors, len(attempts))):
            pool.start(kind.remote(url, make))
        while pool.busy:
            if stop.is_set():
                pool.stop()
                raise Interrupted
            pool.step()
        pool.count_last()
        raise_failures(pool.failures)
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return import_module("ray")
    except ModuleNotFoundError:
        raise JobError("--runner=ray needs Ray: pip install 'xlinfer[ray]'") from None


def _connect(ray: Any, options: RayOptions) -> None:
    given = options.address or os.environ.get("RAY_ADDRESS")
    # A dashboard takes jobs from whoever reaches its port.
    kind = {"address": given} if given else {"address": "local", "include_dashboard": False}
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(**kind, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobError(f"--ray_address={given or 'local'}: {error}") from None
    finally:
        for number, handler in handlers.items():  # Ray's own would end the driver at once
            signal.signal(number, handler)
    have = ray.cluster_resources()
    for name, wanted in options.resources.items():
        if have.get(name, 0) < wanted:
            logger.warning(
                "Each actor wants %s=%g, and the cluster has %g: actors wait until it has more.",
                name,
                wanted,
                have.get(name, 0),
            )


def _actor_kind(ray: Any, options: RayOptions) -> Any:
    resources = dict(options.resources)
    placed = {"num_cpus": resources.pop("CPU", 1), "num_gpus": resources.pop("GPU", 0)}
    return ray.remote(_Actor).options(
        **placed, resources=resources, max_restarts=-1, max_concurrency=CALLS
    )


@dataclass(kw_only=True)
class _Pool:
    """Who is at what. Every attempt is waiting, at one actor, or done with."""

    ray: Any
    waiting: deque[Attempt]
    on_rows: Callable[[int, int, int], None]
    on_commit: Callable[[Commit], None]
    # What an actor has been asked for; no attempt: to say that it is ready.
    asked: dict[Any, tuple[Any, Attempt | None]] = field(default_factory=dict)
    actors: list[Any] = field(default_factory=list)
    counting: list[Any] = field(default_factory=list)  # calls of `counts`
    tries: Counter[int] = field(default_factory=Counter)  # by shard
    failures: list[str] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(attempt for _, attempt in self.asked.values())

    def start(self, actor: Any) -> None:
        self.actors.append(actor)
        self._await(actor)

    def _await(self, actor: Any) -> None:
        # Asked again for as long as Ray restarts it, on whichever machine.
        self.asked[actor.ready.options(max_task_retries=-1).remote()] = (actor, None)

    def step(self) -> None:
        done, _ = self.ray.wait(list(self.asked), timeout=POLL_S)
        for ref in done:
            actor, attempt = self.asked.pop(ref)
            if self._take(ref, actor, attempt) and self.waiting:
                attempt = self.waiting.popleft()
                self.asked[actor.run.remote(attempt)] = (actor, attempt)
        self._count()
        if self.waiting and not self.asked:
            raise JobError(f"no actor is left: {'; '.join(dict.fromkeys(self.failures))}")

    def _take(self, ref: Any, actor: Any, attempt: Attempt | None) -> bool:
        """Whether the actor is free for another attempt."""
        errors = self.ray.exceptions
        try:
            result = self.ray.get(ref)
        except errors.RayActorError as error:
            if attempt is None:  # its engine cannot be built, wherever it is
                self.failures.append(_reason(error))
            else:
                logger.warning("An actor was lost at shard %d.", attempt.shard.index)
                self._again(attempt, error)
                self._await(actor)
            return False
        except errors.RayError as error:
            assert attempt is not None
            self._again(attempt, error)
            return True
        if isinstance(result, Commit):
            self.on_commit(result)
        elif isinstance(result, str):
            self.failures.append(result)
        return True

    def _again(self, attempt: Attempt, error: Exception) -> None:
        self.tries[attempt.shard.index] += 1
        if self.tries[attempt.shard.index] < TRIES:
            self.waiting.append(attempt)
        else:
            self.failures.append(
                f"shard {attempt.shard.index}, tried {TRIES} times: {_reason(error)}"
            )

    def _count(self, wait_s: float = 0.0) -> None:
        if self.counting:
            done, self.counting = self.ray.wait(
                self.counting, num_returns=len(self.counting), timeout=wait_s
            )
            for ref in done:
                try:
                    counts = self.ray.get(ref)
                except self.ray.exceptions.RayError:  # lost, with what it counted
                    continue
                self.on_rows(counts["rows"], counts["failed"], counts["tokens"])
        if not self.counting:
            busy = [actor for actor, attempt in self.asked.values() if attempt is not None]
            self.counting = [actor.counts.remote() for actor in busy]

    def count_last(self) -> None:
        self.counting += [actor.counts.remote() for actor in self.actors]
        self._count(POLL_S)

    def stop(self) -> None:
        running = {ref: actor for ref, (actor, attempt) in self.asked.items() if attempt}
        for actor in running.values():
            actor.stop.remote()
        if running:
            self.ray.wait(list(running), num_returns=len(running), timeout=STOP_S)


def _reason(error: BaseException) -> str:
    """The last line of what Ray says: the exception itself, below its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
