"""The engine: token ids in, token ids out. Knows no text and no clock.

`step` is the whole system: schedule, dispatch, and hand out the results of the step before,
which the device finished meanwhile.
"""

import logging
import weakref
from collections import deque
from collections.abc import Iterable
from itertools import count
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from xlinfer.compile.store import Store
from xlinfer.deployment import Sizes, paths_of
from xlinfer.engine.outputs import Outputs
from xlinfer.engine.pages import PagePool
from xlinfer.engine.ready import Ready, make_ready
from xlinfer.engine.runner import InFlight, Runner
from xlinfer.engine.scheduler import Scheduler
from xlinfer.engine.sequence import Sequence
from xlinfer.engine.slots import check_request, stop_ids
from xlinfer.engine.worker import Executor, Worker
from xlinfer.kvcache import FP8
from xlinfer.progress import Progress
from xlinfer.request import EngineStats, InvalidRequest, Request, TokenOutput

STEPS_IN_FLIGHT = 2  # one runs while the next is scheduled
logger = logging.getLogger("xlinfer.engine")


class Engine:
    """Serves any module that has the members of `xlinfer.models.CausalLM`, or of
    `EncoderDecoderLM`, with the arrays it holds: they are not copied, cast or moved.

    Arguments beside the module:
      mesh: the devices; by default those of the module's first parameter.
      max_model_len: tokens of a sequence, prompt and answer, or of each where an encoder reads
        the prompt; by default the model's positions.
      max_num_seqs, max_num_batched_tokens: rows and tokens of one step.
      page_size: tokens of a KV page.  num_pages: by default what the memory budget holds, and
        no more than all rows at full length need.
      hbm_utilization: fraction of the device's memory for weights, cache and temporaries; on
        CPU the cache's budget is 1 GiB instead.
      decode_window: most tokens that one row alone gains in one device call while nobody waits;
        rows that run together gain a quarter of it.
      deterministic: one program for every token, so a request's bits do not depend on load.
      attention_impl: of pallas_kernels.paged_attention; by default what that op chooses for the
        device.
      kv_cache_dtype: of xlinfer.kvcache.CACHE_DTYPES; by default the activations', or fp8 where the
        model has scales for it.
      seed: for requests that name none.
      kept: where compiled programs are looked for and left.
      progress: called as progress("compile", done, total).

    Raises PlanError when the numbers do not fit each other or the memory, ValueError when the
    device has no such implementation, TypeError when the module lacks a member. Not thread-safe.
    """

    def __init__(
        self,
        model: nnx.Module,
        *,
        mesh: Mesh | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        hbm_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        decode_window: int = 32,
        deterministic: bool = False,
        attention_impl: str | None = None,
        kv_cache_dtype: str = "auto",
        max_logprobs: int = 20,
        seed: int = 0,
        kept: Store | None = None,
        progress: Progress | None = None,
    ):
        sizes = Sizes(
            max_model_len=max_model_len, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, page_size=page_size,
            num_pages=num_pages, hbm_utilization=hbm_utilization,
            decode_window=decode_window, deterministic=deterministic,
            attention_impl=attention_impl, kv_cache_dtype=kv_cache_dtype,
            max_logprobs=max_logprobs,
        )  # fmt: skip
        ready = make_ready(model, sizes, mesh=mesh, kept=kept, progress=progress)
        self._start(ready, Worker(ready), enable_prefix_caching, seed)

    @classmethod
    def of(
        cls,
        ready: Ready,
        *,
        executor: Executor | None = None,
        enable_prefix_caching: bool = True,
        seed: int = 0,
    ) -> "Engine":
        """Of programs that are compiled already. `executor` runs them; by default a Worker on the
        devices of this host."""
        engine = cls.__new__(cls)
        engine._start(ready, executor or Worker(ready), enable_prefix_caching, seed)
        return engine

    def _start(
        self, ready: Ready, executor: Executor, enable_prefix_caching: bool, seed: int
    ) -> None:
        self.plan, self.vocab_size = ready.plan, ready.vocab_size
        self.attention_impl, self.kv_cache_dtype = ready.attention_impl, ready.kv_cache_dtype
        _tell_of_cache(ready)
        self._paths, self._executor = ready.paths, executor
        platform = ready.mesh.devices.flat[0].platform
        self._runner = Runner(
            executor, self.plan, platform=platform, vocab_size=self.vocab_size, seed=seed
        )
        self._scheduler = Scheduler(
            self.plan, PagePool(self.plan.num_pages), enable_prefix_caching=enable_prefix_caching
        )
        self._sequences: dict[str, Sequence] = {}  # unfinished, by request id
        self._in_flight: deque[InFlight] = deque()
        # At exit too: what a step gives, jax hands over by calling the interpreter, and the process
        # aborts where that has ended.
        weakref.finalize(self, _finish, self._in_flight)
        self._outputs = Outputs()
        self._arrivals = count()

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest, and then nothing has changed."""
        check_request(request, self.vocab_size, self.plan)
        if request.request_id in self._sequences:
            message = f"The request id {request.request_id!r} is in use."
            raise InvalidRequest("request_id", message)
        prompt = request.prompt_token_ids
        most = 0 if request.pooling else request.sampling.max_tokens
        longest = self.plan.max_model_len
        seq = Sequence(
            request=request,
            order=(request.priority, request.arrival_time, next(self._arrivals)),
            max_length=longest if most is None else min(len(prompt) + most, longest),
            stop_ids=frozenset(stop_ids(request)),
            tokens=list(prompt),
        )
        self._sequences[request.request_id] = seq
        self._scheduler.add(seq)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget these requests and free what they hold; unknown ids are no error, since the
        request may just have finished. They are not heard of again."""
        for request_id in request_ids:
            if (seq := self._sequences.pop(request_id, None)) is not None:
                self._scheduler.finish(seq)
                self._outputs.drop(seq)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._in_flight or self._outputs.ready)

    @property
    def max_running(self) -> int:
        """Sequences that can run at once."""
        return self.plan.max_num_seqs

    def step(self) -> list[TokenOutput]:
        """Schedule what can run and return what the oldest step in flight gave, waiting for it
        to be done. Empty when that gave nothing to tell."""
        self.dispatch()
        return self.receive()

    def dispatch(self) -> int:
        """The first half of `step`: how many steps went to the device."""
        before = len(self._in_flight)
        while len(self._in_flight) < STEPS_IN_FLIGHT and (step := self._scheduler.schedule()):
            self._in_flight.append(self._runner.start(step))
        return len(self._in_flight) - before

    def receive(self) -> list[TokenOutput]:
        """The second half of `step`."""
        if self._in_flight:
            self._receive(self._in_flight.popleft())
        return self._outputs.take()

    @property
    def is_ready(self) -> bool:
        """Whether `receive` has something to do, and need not wait for it."""
        return bool(self._outputs.ready) or (bool(self._in_flight) and self._in_flight[0].is_ready)

    def stats(self) -> EngineStats:
        scheduler, pool = self._scheduler, self._scheduler.pool
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            kv_cache_usage=1 - pool.num_free / pool.num_pages,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._outputs.prompt_tokens,
            generation_tokens=self._outputs.generation_tokens,
        )

    def update_weights(self, params: Any) -> None:
        """Swap the parameters between steps: `params` is `nnx.state` of a module of the same
        structure, shapes and dtypes. Arrays already in the old ones' shardings are not copied.

        Unfinished requests go on with the new weights: their KV is computed again. Raises
        ValueError naming the parameter that does not fit, or where other hosts would keep theirs,
        and then nothing has changed.
        """
        leaves = jax.tree.leaves(params)
        if paths_of(params) != self._paths:
            raise ValueError("The new parameters have another structure than the model's.")
        for path, new, old in zip(self._paths, leaves, self._executor.params, strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"{path} is {new.dtype}{list(new.shape)}, the model's is "
                    f"{old.dtype}{list(old.shape)}."
                )
        self._executor.replace_params(tuple(leaves))
        while self._in_flight:
            self._receive(self._in_flight.popleft())
        self._scheduler.restart_all()
        self._outputs.forget_prompts()

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running requests keep theirs."""
        self._scheduler.pool.forget_all()

    def check(self) -> None:
        """AssertionError unless every page and slot is accounted for."""
        self._scheduler.check()

    def _receive(self, done: InFlight) -> None:
        for seq in self._outputs.receive(done, self._scheduler):
            self._scheduler.finish(seq)
            del self._sequences[seq.request.request_id]


def _tell_of_cache(ready: Ready) -> None:
    is_fp8 = ready.kv_cache_dtype == FP8.name
    by = " by the model's scales" if is_fp8 and ready.kv_scales else ""
    logger.info("attention: %s, KV cache: %s%s", ready.attention_impl, ready.kv_cache_dtype, by)
    if is_fp8 and not ready.kv_scales:
        logger.warning(
            "the KV cache is fp8, and the model has no k_scale and v_scale: they are 1.0"
        )
    if ready.kv_scales and not is_fp8:
        logger.warning(
            "the KV cache is %s: the model's k_scale and v_scale are not used", ready.kv_cache_dtype
        )


def _finish(in_flight: deque[InFlight]) -> None:
    while in_flight:
        in_flight.popleft().fetch()
