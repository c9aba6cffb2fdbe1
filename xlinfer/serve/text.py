"""Between text and the engine's token ids: one `TextRequest` becomes n requests, and their
`TokenOutput`s become answers. The library and the server both speak through it.

Results have vLLM's names and shapes (`RequestOutput`, `CompletionOutput`, `Logprob`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from xlinfer.request import (
    FinishReason,
    InvalidRequest,
    Pooling,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from xlinfer.serve.detokenizer import Detokenizer, StopStrings
from xlinfer.serve.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Logprob:
    logprob: float
    rank: int  # in the vocabulary, from 1
    decoded_token: str


# Position -> the token that stands there first, then the most likely ones.
PositionLogprobs = dict[int, Logprob]


@dataclass(kw_only=True)
class CompletionOutput:
    """One answer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None  # None unless logprobs were asked for
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or token; None for EOS

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(kw_only=True)
class RequestOutput:
    """All answers to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one answer gained. `token_ids` and `logprobs` may run ahead of `text`, which is held
    while it may still turn out to be part of a character or of a stop string."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class TextRequest:
    """One prompt and its n answers, of which it keeps the state.

    `decoder_start` is what the decoder of an encoder-decoder model begins with: the prompt is its
    encoder's. With `pooling` there is no answer but `pooled`. Raises InvalidRequest when `sampling`
    cannot be put into tokens.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int] = (),
        decoder_start: Sequence[int] = (),
        prompt: str | None = None,
        pooling: Pooling | None = None,
        priority: int = 0,
        arrival_time: float = 0.0,
        cache_salt: str = "",
    ):
        self.request_id, self.prompt, self.sampling = request_id, prompt, sampling
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.pooled: np.ndarray | None = None
        self.num_cached_tokens = 0
        self.answers = [
            Answer(index, decoder_start or self.prompt_token_ids, sampling, tokenizer)
            for index in range(sampling.n)
        ]
        self._tokenizer = tokenizer
        first = Request(
            request_id=sequence_id(0, request_id),
            prompt_token_ids=tuple(decoder_start) or self.prompt_token_ids,
            encoder_token_ids=self.prompt_token_ids if decoder_start else (),
            sampling=sampling,
            eos_token_ids=tuple(eos_token_ids),
            pooling=pooling,
            bad_words_token_ids=tokenize_bad_words(sampling.bad_words or (), tokenizer),
            priority=priority,
            arrival_time=arrival_time,
            cache_salt=cache_salt,
        )
        # The prompt is scored once: only the first answer's request brings its logprobs.
        plain = replace(sampling, prompt_logprobs=None) if sampling.max_tokens != 0 else sampling
        self.requests = [first] + [
            replace(
                first,
                request_id=sequence_id(index, request_id),
                sampling=plain,
                answer_index=index,
            )
            for index in range(1, sampling.n)
        ]
        self._index = {request.request_id: n for n, request in enumerate(self.requests)}

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    @property
    def unfinished_ids(self) -> list[str]:
        pairs = zip(self.requests, self.answers, strict=True)
        return [request.request_id for request, answer in pairs if answer.finish_reason is None]

    def add(self, output: TokenOutput) -> tuple[Delta, bool]:
        """The news in text, and whether the engine must abort the request of `output` because a
        stop string ended it. News after an answer's end is empty."""
        index = self._index[output.request_id]
        if index == 0:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
            self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
            self.pooled = output.pooled
        answer = self.answers[index]
        delta = answer.add(output)
        return delta, answer.stopped_by_string and output.finish_reason is None

    def output(self) -> RequestOutput:
        """Everything so far."""
        prompt_logprobs = None
        if self.sampling.prompt_logprobs is not None and self.prompt_logprobs is not None:
            prompt_logprobs = [
                position and position_logprobs(position, self._tokenizer)
                for position in self.prompt_logprobs
            ]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            prompt_logprobs=prompt_logprobs,
            outputs=[answer.output() for answer in self.answers],
            finished=self.finished,
            num_cached_tokens=self.num_cached_tokens,
        )


class Answer:
    """One sequence's tokens and the text that is certain so far."""

    def __init__(
        self, index: int, prompt_token_ids: Sequence[int], params: SamplingParams, tok: Tokenizer
    ):
        self.index, self.text, self.token_ids = index, "", []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.stopped_by_string = False
        self._params, self._tokenizer = params, tok
        self._detokenizer = Detokenizer(
            tok, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        stops = params.stop_strings
        self._stops = StopStrings(stops, params.include_stop_str_in_output) if stops else None

    def add(self, output: TokenOutput) -> Delta:
        if self.finish_reason is not None:
            return self._delta("", 0)
        before = len(self.token_ids)
        text, used = self._read(output)
        self.token_ids += output.token_ids[:used]
        if self.logprobs is not None:
            self.logprobs += (output.logprobs or [])[:used]
        if not self.stopped_by_string and output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        self.text += text
        return self._delta(text, len(self.token_ids) - before)

    def output(self) -> CompletionOutput:
        logprobs = cumulative = None
        if self.logprobs is not None:
            logprobs = [position_logprobs(position, self._tokenizer) for position in self.logprobs]
            cumulative = sum(position.logprobs[0] for position in self.logprobs)
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.token_ids),
            cumulative_logprob=cumulative,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _read(self, output: TokenOutput) -> tuple[str, int]:
        """(new certain text, how many of the new tokens belong to the answer)."""
        ids, last = output.token_ids, output.finish_reason is not None
        if not self._params.detokenize:
            return "", len(ids)
        # The token that ended the answer is not part of what it says.
        ended = output.finish_reason == "stop" and not self._params.include_stop_str_in_output
        spoken = ids[:-1] if ended else ids
        if self._stops is None:
            text = self._detokenizer.add(spoken)
            return text + (self._detokenizer.flush() if last else ""), len(ids)
        text = ""
        for used, id in enumerate(spoken, start=1):
            if len(self.token_ids) + used <= self._params.min_tokens:
                text += self._detokenizer.add([id])  # too early to stop
                continue
            if self._matched(piece := self._stops.add(self._detokenizer.add([id]))):
                return text + piece[0], used
            text += piece[0]
        if last:
            if self._matched(piece := self._stops.add(self._detokenizer.flush())):
                return text + piece[0], len(ids)
            text += piece[0] + self._stops.flush()
        return text, len(ids)

    def _matched(self, piece: tuple[str, str | None]) -> bool:
        if piece[1] is None:
            return False
        self.finish_reason, self.stop_reason, self.stopped_by_string = "stop", piece[1], True
        return True

    def _delta(self, text: str, tokens: int) -> Delta:
        return Delta(
            index=self.index,
            text=text,
            token_ids=self.token_ids[len(self.token_ids) - tokens :],
            logprobs=self.logprobs and self.logprobs[len(self.token_ids) - tokens :],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def sequence_id(index: int, request_id: str) -> str:
    return f"{index}_{request_id}"


def position_logprobs(position: TokenLogprobs, tokenizer: Tokenizer) -> PositionLogprobs:
    """vLLM's form: the token itself first with its rank, then the most likely, ranked from 1."""
    ranks = [position.rank, *range(1, len(position.token_ids))]
    entries: PositionLogprobs = {}
    for id, logprob, rank in zip(position.token_ids, position.logprobs, ranks, strict=True):
        if id not in entries:  # the token itself may be among the most likely
            text = tokenizer.token_text(id)
            entries[id] = Logprob(logprob=logprob, rank=rank, decoded_token=text)
    return entries


def tokenize_bad_words(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it begins a text and, where that differs, as it follows a space: vLLM's rule."""
    found = []
    for word in words:
        plain = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False, param="bad_words"))
        if not plain:
            raise InvalidRequest("bad_words", f"bad_words must not hold only spaces: {word!r}.")
        found.append(plain)
        spaced = tuple(
            tokenizer.encode(" " + word.lstrip(), add_special_tokens=False, param="bad_words")
        )
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return tuple(found)


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest unless every id is an integer in [0, vocab_size)."""
    for id in ids:
        if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < vocab_size:
            message = f"{param} must hold token ids from 0 to {vocab_size - 1}, got {id!r}."
            raise InvalidRequest(param, message)
