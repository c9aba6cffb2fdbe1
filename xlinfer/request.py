"""What is asked for and what comes back, in token ids. Plain data; no jax.

Names and meanings are vLLM's (`vllm.SamplingParams`, `vllm.RequestOutput`), so that code
written against it runs unchanged.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
# Of a prompt's hidden states after the final norm: the last, their mean, the first.
Pooling = Literal["last", "mean", "cls"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

# Bounds that keep one request from costing more than its tokens. All are answered with
# InvalidRequest, never by truncation.
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters
MAX_STOP_TOKEN_IDS = 64
MAX_BAD_WORDS = 64
MAX_LOGIT_BIAS = 1024
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1
GREEDY_BELOW = 1e-5  # a temperature; logits divided by less leave float32


class InvalidRequest(ValueError):
    """The request cannot be served as written. `param` names the field that is wrong."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Field for field as in vLLM.

    Raises InvalidRequest on construction when a value is out of range. Limits that depend on
    the model (vocabulary, context, logprobs) are checked by the engine when the request arrives.
    """

    n: int = 1  # answers for the prompt
    temperature: float = 1.0  # 0: the most likely token each time
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    min_p: float = 0.0  # relative to the most likely token's probability
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None  # kept as a tuple of strings
    stop_token_ids: Sequence[int] | None = None  # kept as a tuple
    bad_words: Sequence[str] | None = None  # kept as a tuple
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the context's end; 0: only score the prompt
    min_tokens: int = 0
    logprobs: int | None = None  # this many most likely tokens beside the chosen; -1: all
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)  # frozen afterwards
        put("stop", (self.stop,) if isinstance(self.stop, str) else _entries("stop", self.stop))
        for name in ("stop_token_ids", "bad_words"):
            put(name, _entries(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _entries("allowed_token_ids", self.allowed_token_ids))
        if self.logit_bias is not None:
            put("logit_bias", _token_biases(self.logit_bias))
        self._check_ranges()
        self._check_lists()
        put("top_k", max(self.top_k, 0))
        if self.temperature < GREEDY_BELOW:
            put("temperature", 0.0)

    def _check_ranges(self):
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 1e4)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p", "top_p must be in (0, 1], got 0.")
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 1e-4, 1e4)
        if self.seed is not None:
            _integer("seed", self.seed, SEED_MIN, SEED_MAX)
        if self.max_tokens is not None:
            least = 0 if self.prompt_logprobs is not None else 1
            _integer("max_tokens", self.max_tokens, least, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                "min_tokens",
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}.",
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _integer(name, value, -1, 2**31 - 1)
        for name in (
            *("include_stop_str_in_output", "ignore_eos", "detokenize"),
            *("skip_special_tokens", "spaces_between_special_tokens"),
        ):
            if not isinstance(value := getattr(self, name), bool):
                raise InvalidRequest(name, f"{name} must be True or False, got {value!r}.")

    def _check_lists(self):
        stop, bad_words = self.stop_strings, self.bad_words or ()
        _count("stop", stop, MAX_STOP_STRINGS)
        _count("stop_token_ids", self.stop_token_ids or (), MAX_STOP_TOKEN_IDS)
        _count("bad_words", bad_words, MAX_BAD_WORDS)
        _count("logit_bias", self.logit_bias or (), MAX_LOGIT_BIAS)
        for name, words in (("stop", stop), ("bad_words", bad_words)):
            for word in words:
                if not isinstance(word, str) or not 0 < len(word) <= MAX_STOP_LENGTH:
                    raise InvalidRequest(
                        name,
                        f"{name} must hold strings of 1 to {MAX_STOP_LENGTH} characters.",
                    )
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _integer(name, token, 0, 2**31 - 1)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids", "allowed_token_ids must not be empty.")
        if stop and not self.detokenize:
            raise InvalidRequest("stop", "stop strings need detokenize=True.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        message = f"{name} must be an integer from {low} to {high}, got {value!r}."
        raise InvalidRequest(name, message)


def _number(name: str, value: object, low: float, high: float) -> None:
    # NaN is in no range.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(name, f"{name} must be a number in [{low}, {high}], got {value!r}.")


def _entries(name: str, values: object) -> tuple:
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | Set):
        raise InvalidRequest(name, f"{name} must be a list, got {values!r}.")
    return tuple(values)


def _count(name: str, values: object, most: int) -> None:
    if len(values) > most:  # type: ignore[arg-type]
        raise InvalidRequest(name, f"{name} must have at most {most} entries, got {len(values)}.")  # type: ignore[arg-type]


def _token_biases(biases: Mapping[int, float]) -> dict[int, float]:
    """JSON spells the keys as strings; both spellings are read."""
    if not isinstance(biases, Mapping):
        message = f"logit_bias must map token ids to numbers, got {biases!r}."
        raise InvalidRequest("logit_bias", message)
    result = {}
    for token, bias in biases.items():
        if isinstance(token, str) and token.isdecimal() and len(token) < 20:
            token = int(token)
        _integer("logit_bias", token, 0, 2**31 - 1)
        _number("logit_bias", bias, -100.0, 100.0)
        result[token] = float(bias)
    return result


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate: `sampling.n` answers arrive here as n requests."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    # Nothing is generated: the answer is TokenOutput.pooled, and `sampling` is not looked at.
    pooling: Pooling | None = None
    # What the encoder reads of an encoder-decoder model; prompt_token_ids are its decoder's first.
    encoder_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()  # end the answer unless sampling.ignore_eos
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # sampling.bad_words, tokenized
    # The first prompt position that sampling.prompt_logprobs is asked of; what only comes before it
    # may be found in the prefix cache.
    score_from: int = 0
    answer_index: int = 0  # 0 ≤ index < n; folded into the seed, so that answers differ
    priority: int = 0  # lower runs first
    arrival_time: float = 0.0  # seconds, any clock; orders equals
    cache_salt: str = ""  # prefixes are shared only between requests of one salt


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """One position's log-probabilities, of the logits before any sampling parameter.

    `token_ids[0]` is the token that stands there; the most likely ones follow, best first.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int  # of token_ids[0] in the vocabulary, from 1


@dataclass(kw_only=True)
class TokenOutput:
    """What one request gained since it was last heard of."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None  # beside token_ids, when asked for
    # One entry a prompt token from score_from on (None for the prompt's first, which follows
    # nothing), given once, with the first token or the end.
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop_token_ids member that ended it; None for EOS
    pooled: np.ndarray | None = None  # float32 [hidden size], not normalised; given with the end
    num_cached_tokens: int = 0  # prompt tokens whose KV was found in the prefix cache


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """The engine's state and its counters since it started."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # pages held by running requests, as a fraction of all
    prefix_cache_queries: int  # prompt tokens looked up in the prefix cache
    prefix_cache_hits: int  # of them found
    num_preemptions: int
    prompt_tokens: int  # prompt tokens of requests whose prompt has been computed
    generation_tokens: int
