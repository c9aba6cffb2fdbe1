"""What is measured, under vLLM's names, so that its dashboards and gateways read it unchanged.

One registry a server: nothing here is global. Times are in seconds on the monotonic clock.
"""

from dataclasses import dataclass, field
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from xlinfer.plan import Plan
from xlinfer.request import EngineStats
from xlinfer.serve.text import Answer, TextRequest

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5)
_TTFT += (10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_PER_TOKEN += (1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0)
_REQUEST += (60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20, 50, 100)
# name -> (what it is, buckets; None: 1-2-5 up to max_model_len)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _TTFT),
    "inter_token_latency_seconds": ("Between two tokens of one answer.", _PER_TOKEN),
    "request_time_per_output_token_seconds": ("Mean of it over an answer.", _PER_TOKEN),
    "e2e_request_latency_seconds": ("From a request's arrival to an answer's end.", _REQUEST),
    "request_decode_time_seconds": ("From the first token to an answer's end.", _REQUEST),
    "request_prompt_tokens": ("Tokens of a prompt.", None),
    "request_generation_tokens": ("Tokens of an answer.", None),
    "request_params_max_tokens": ("max_tokens as asked for.", None),
    "request_params_n": ("n as asked for.", _N),
    "iteration_tokens_total": ("Tokens computed in one engine step.", _ITERATION),
}
# Field of EngineStats -> what it is
_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "num_preemptions": "Requests preempted to free pages.",
    "prompt_tokens": "Prompt tokens computed.",
    "generation_tokens": "Tokens generated.",
}
# name -> (what it is, the field of EngineStats it shows)
_GAUGES = {
    "num_requests_running": ("Sequences in the batch.", "num_running"),
    "num_requests_waiting": ("Sequences that wait for room.", "num_waiting"),
    "kv_cache_usage_perc": ("Pages in use, from 0 to 1.", "kv_cache_usage"),
}
RATE_S = 5.0  # the throughput of about this long ago still counts half


@dataclass
class RequestTimes:
    arrival: float
    first_token: float | None = None
    last_token: dict[int, float] = field(default_factory=dict)  # by answer
    first_of_answer: dict[int, float] = field(default_factory=dict)


class Metrics:
    """`plan` makes the histograms' buckets and the cache's facts; until then little is known."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self.tokens_per_s = 0.0  # computed, prompt and answers; an average of the last seconds
        self._labels = {"model_name": model_name, "engine": "0"}
        self._seen: EngineStats | None = None
        self._seen_at = monotonic()
        self._gauges = {name: self._make(Gauge, name, text) for name, (text, _) in _GAUGES.items()}
        self._counters = {n: self._make(Counter, n, text) for n, text in _COUNTERS.items()}
        self._histograms: dict[str, Histogram] = {}
        self._success = self._make(Counter, "request_success", "Answers ended.", "finished_reason")
        self._rejections = self._make(
            Counter, "admission_rejections", "Requests refused for lack of room.", "reason"
        )
        self._ignored = Counter(
            "xlinfer:ignored_fields",
            "Request fields that no served API defines, which were ignored.",
            ["model_name"],
            registry=self.registry,
        ).labels(model_name=model_name)
        for reason in ("stop", "length", "abort"):
            self._success.labels(**self._labels, finished_reason=reason)

    def use_plan(self, plan: Plan) -> None:
        for name, (text, buckets) in _HISTOGRAMS.items():
            buckets = buckets or _one_two_five(plan.max_model_len)
            self._histograms[name] = self._make(Histogram, name, text, buckets=buckets)
        facts = {"block_size": plan.page_size, "num_gpu_blocks": plan.num_pages}
        labels = {**self._labels, **{name: str(value) for name, value in facts.items()}}
        info = Gauge("vllm:cache_config_info", "The KV cache.", labels, registry=self.registry)
        info.labels(**labels).set(1)

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def step(self, stats: EngineStats) -> None:
        now, seen = monotonic(), self._seen
        for name, (_, source) in _GAUGES.items():
            self._gauges[name].set(getattr(stats, source))
        for name in _COUNTERS:
            gained = getattr(stats, name) - (getattr(seen, name) if seen else 0)
            if gained > 0:
                self._counters[name].inc(gained)
        before = seen.prompt_tokens + seen.generation_tokens if seen else 0
        if (gained := stats.prompt_tokens + stats.generation_tokens - before) > 0:
            self._observe("iteration_tokens_total", gained)
            if seen and seen.num_running + seen.num_waiting:  # it was not idle in between
                seconds = max(now - self._seen_at, 1e-6)
                kept = 0.5 ** (seconds / RATE_S) if self.tokens_per_s else 0.0
                self.tokens_per_s = kept * self.tokens_per_s + (1 - kept) * gained / seconds
        self._seen, self._seen_at = stats, now

    def tokens(self, times: RequestTimes, index: int, count: int) -> None:
        """`count` tokens of answer `index` have just come."""
        if not count:
            return
        now = monotonic()
        if times.first_token is None:
            times.first_token = now
            self._observe("time_to_first_token_seconds", now - times.arrival)
        last = times.last_token.get(index)
        times.last_token[index] = now
        times.first_of_answer.setdefault(index, now)
        if last is not None:
            for _ in range(count):
                self._observe("inter_token_latency_seconds", (now - last) / count)

    def sequence_finished(self, times: RequestTimes, answer: Answer, text: TextRequest) -> None:
        now, count = monotonic(), len(answer.token_ids)
        self._success.labels(**self._labels, finished_reason=answer.finish_reason).inc()
        self._observe("e2e_request_latency_seconds", now - times.arrival)
        self._observe("request_generation_tokens", count)
        if (first := times.first_of_answer.get(answer.index)) is not None:
            self._observe("request_decode_time_seconds", now - first)
            if count > 1:
                self._observe("request_time_per_output_token_seconds", (now - first) / (count - 1))
        if answer.index == 0:
            self._observe("request_prompt_tokens", len(text.prompt_token_ids))
            self._observe("request_params_n", text.sampling.n)
            if text.sampling.max_tokens is not None:
                self._observe("request_params_max_tokens", text.sampling.max_tokens)

    def abort(self, count: int) -> None:
        self._success.labels(**self._labels, finished_reason="abort").inc(count)

    def reject(self, reason: str) -> None:
        self._rejections.labels(**self._labels, reason=reason).inc()

    def ignored_fields(self, count: int) -> None:
        self._ignored.inc(count)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def _make(self, kind, name: str, text: str, *more: str, **options):
        names = [*self._labels, *more]
        made = kind(f"vllm:{name}", text, names, registry=self.registry, **options)
        return made if more else made.labels(**self._labels)


def _one_two_five(most: int) -> tuple[int, ...]:
    steps = [step * 10**power for power in range(8) for step in (1, 2, 5)]
    return tuple(step for step in steps if step <= most)
