"""An engine whose tokens are known beforehand, and a server around it on a loopback port."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from xlinfer.config import GenerationConfig
from xlinfer.plan import Plan
from xlinfer.request import EngineStats, InvalidRequest, Request, TokenLogprobs, TokenOutput
from xlinfer.serve.build import Built, TokenEngine
from xlinfer.serve.lifecycle import listen, new_http, new_server
from xlinfer.serve.server import Server, ServerOptions
from xlinfer.serve.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data" / "tokenizer"
EOS = (0, 2)
MODEL = "fake-model"


def make_plan(**changes) -> Plan:
    plan = Plan(
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        page_size=16,
        num_pages=128,
        token_buckets=(64,),
        decode_buckets=(8,),
        encode_buckets=(),
        decode_window=1,
        max_logprobs=5,
    )
    return replace(plan, **changes)


class FakeEngine:
    """Answer i of every prompt is `reply[i:]`, over and over; logprobs follow from the token id.

    `step_s` slows each step; `fail` makes the next step raise; `hold` stops steps from giving
    tokens. It refuses to be called by two threads.
    """

    def __init__(self, reply: list[int], plan: Plan, *, step_s: float = 0.0, tokens: int = 1):
        self.plan, self.vocab_size = plan, 4096
        self.reply, self.step_s, self.tokens = reply, step_s, tokens
        self.fail: Exception | None = None
        self.hold = threading.Event()
        self.seen: list[Request] = []
        self.aborted: list[str] = []
        self._running: dict[str, tuple[Request, int]] = {}
        self._thread: int | None = None
        self._prompt_tokens = self._generated = 0

    @property
    def max_running(self) -> int:
        return self.plan.max_num_seqs

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def add_request(self, request: Request) -> None:
        self._one_thread()
        for id in [*request.prompt_token_ids, *(request.sampling.logit_bias or ())]:
            if id >= self.vocab_size:
                raise InvalidRequest("logit_bias", f"token id {id} is not in the vocabulary.")
        if len(request.prompt_token_ids) >= self.plan.max_model_len:
            raise InvalidRequest("prompt", "the prompt is longer than the context.")
        assert request.request_id not in self._running
        self.seen.append(request)
        self._running[request.request_id] = request, 0

    def abort(self, request_ids: Iterable[str]) -> None:
        self._one_thread()
        for id in request_ids:
            if self._running.pop(id, None):
                self.aborted.append(id)

    def step(self) -> list[TokenOutput]:
        self._one_thread()
        time.sleep(self.step_s)
        if self.fail is not None:
            raise self.fail
        if self.hold.is_set():
            time.sleep(0.002)
            return []
        rows = list(self._running.items())[: self.plan.max_num_seqs]
        return [self._advance(request, done) for _, (request, done) in rows]

    def stats(self) -> EngineStats:
        running = min(len(self._running), self.plan.max_num_seqs)
        return EngineStats(
            num_running=running,
            num_waiting=len(self._running) - running,
            kv_cache_usage=0.25,
            prefix_cache_queries=self._prompt_tokens,
            prefix_cache_hits=0,
            num_preemptions=0,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generated,
        )

    def _advance(self, request: Request, done: int) -> TokenOutput:
        params, output = request.sampling, TokenOutput(request_id=request.request_id)
        most = self.plan.max_model_len - len(request.prompt_token_ids)
        most = most if params.max_tokens is None else params.max_tokens
        if done == 0:
            self._prompt_tokens += len(request.prompt_token_ids)
            output.num_cached_tokens = 3
            if params.prompt_logprobs is not None:
                scored = [
                    logprobs_of(id, params.prompt_logprobs) for id in request.prompt_token_ids[1:]
                ]
                output.prompt_logprobs = [None, *scored]
        while len(output.token_ids) < self.tokens and done < most:
            id = self.reply[(request.answer_index + done) % len(self.reply)]
            output.token_ids.append(id)
            done += 1
            if id in (params.stop_token_ids or ()) and done > params.min_tokens:
                output.finish_reason, output.stop_reason = "stop", id
                break
            if id in request.eos_token_ids and not params.ignore_eos:
                output.finish_reason = "stop"
                break
        if output.finish_reason is None and done >= most:
            output.finish_reason = "length"
        if params.logprobs is not None:
            output.logprobs = [logprobs_of(id, params.logprobs) for id in output.token_ids]
        self._generated += len(output.token_ids)
        self._running[request.request_id] = request, done
        if output.finish_reason is not None:
            del self._running[request.request_id]
        return output

    def _one_thread(self) -> None:
        self._thread = self._thread or threading.get_ident()
        assert self._thread == threading.get_ident(), "the engine was called from two threads"


def logprobs_of(id: int, top: int) -> TokenLogprobs:
    """The token itself at rank 2 with -1.5; its rivals are the ids after it."""
    rivals = [id + 1 + n if n != 1 else id for n in range(top)]
    return TokenLogprobs(
        token_ids=(id, *rivals),
        logprobs=(-1.5, *(-1.0 - 0.5 * n for n in range(top))),
        rank=2,
    )


class RunningServer:
    """The real application over HTTP, with the engine's thread, in a thread of this process."""

    def __init__(
        self,
        engine: TokenEngine,
        tokenizer: Tokenizer,
        *,
        generation: GenerationConfig | None = None,
        make: Callable[[], Built] | None = None,
        **options,
    ):
        generation = generation or GenerationConfig(eos_token_ids=EOS)
        self.built = Built(engine=engine, tokenizer=tokenizer, generation=generation)
        self._make, self._wait = make or (lambda: self.built), make is None
        fixed = {"model_root": "fake", "served_model_names": (MODEL, "alias"), "created": 1}
        self._options = ServerOptions(**{**fixed, **options})
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        listener = listen("127.0.0.1", 0)
        self._listener, self.url = listener, f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server: Server

    def __enter__(self) -> "RunningServer":
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *exc) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def on_loop(self, function, *args):
        """The result of `function` or coroutine function, on the server's event loop."""

        async def call():
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.server = new_server(self._options, self._make)
        http = new_http(self.server)
        serving = asyncio.ensure_future(http.serve(sockets=[self._listener]))
        self.server.engine.start()
        while not http.started:
            await asyncio.sleep(0.005)
        if self._wait:
            await self.server.engine.ready
        self._started.set()
        await self._stop.wait()
        http.should_exit = True
        await serving
        self.server.engine.stop()
        self.server.engine.join(5)
