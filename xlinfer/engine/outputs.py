"""Results of finished steps -> what each request is told."""

from xlinfer.engine.batch import wants_prompt_logprobs
from xlinfer.engine.runner import InFlight
from xlinfer.engine.scheduler import Forward, Scheduler
from xlinfer.engine.sequence import Sequence
from xlinfer.engine.slots import stop_ids
from xlinfer.programs import Sampled
from xlinfer.request import FinishReason, TokenLogprobs, TokenOutput
from xlinfer.sampling import Logprobs


class Outputs:
    """Collects each request's news until `take` hands it out."""

    def __init__(self):
        self.prompt_tokens = self.generation_tokens = 0
        self.ready: dict[str, TokenOutput] = {}
        self._prompt_logprobs: dict[Sequence, list[TokenLogprobs | None]] = {}

    def take(self) -> list[TokenOutput]:
        ready, self.ready = list(self.ready.values()), {}
        return ready

    def drop(self, seq: Sequence) -> None:
        """Nobody wants its news any more."""
        self.ready.pop(seq.request.request_id, None)
        self._prompt_logprobs.pop(seq, None)

    def receive(self, done: InFlight, scheduler: Scheduler) -> list[Sequence]:
        """Give every sequence of the step its tokens; returns those that are finished."""
        sampled, scores = done.fetch()
        finished = []
        if isinstance(done.step, Forward):
            if scores is not None:
                self._note_scores(done.step, scores)
            row = 0
            for chunk in done.step.chunks:
                seq = chunk.seq
                if chunk.samples:
                    assert sampled is not None
                    finished += self._give(seq, sampled, row, 1, scheduler)
                    row += 1
                elif seq.max_length == seq.num_prompt == chunk.start + chunk.count:
                    finished += self._finish_scored(seq)
        else:
            assert sampled is not None
            for row, (seq, gain) in enumerate(zip(done.step.seqs, done.step.gains, strict=True)):
                finished += self._give(seq, sampled, row, gain, scheduler)
        return finished

    def _give(
        self, seq: Sequence, sampled: Sampled, row: int, promised: int, scheduler: Scheduler
    ) -> list[Sequence]:
        if seq.finished:
            return []
        count = int(sampled.count_R[row])
        tokens = sampled.token_WR[:count, row].tolist()
        first_news = len(seq.tokens) == seq.num_prompt
        scheduler.received(seq, tokens, promised)
        if not tokens:
            return []
        out = self._output(seq)
        if first_news:
            self.prompt_tokens += seq.num_prompt
            out.prompt_logprobs = self._prompt_logprobs.pop(seq, None)
        self.generation_tokens += count
        out.token_ids += tokens
        if seq.request.sampling.logprobs is not None:
            logprobs = sampled.logprobs
            assert logprobs is not None
            asked = _at_most(seq.request.sampling.logprobs, logprobs)
            new = [
                token_logprobs(logprobs, (w, row), token, asked) for w, token in enumerate(tokens)
            ]
            out.logprobs = (out.logprobs or []) + new
        out.finish_reason, out.stop_reason = _ending(seq)
        return [seq] if out.finish_reason else []

    def _finish_scored(self, seq: Sequence) -> list[Sequence]:
        """A request for its prompt's log-probabilities alone has them."""
        if seq.finished:
            return []
        out = self._output(seq)
        out.prompt_logprobs = self._prompt_logprobs.pop(seq, [None])
        out.finish_reason = "length"
        self.prompt_tokens += seq.num_prompt
        return [seq]

    def _note_scores(self, step: Forward, scores: Logprobs) -> None:
        t = 0
        for chunk in step.chunks:
            seq, first = chunk.seq, t
            t += chunk.count
            if seq.finished or not wants_prompt_logprobs(chunk):
                continue
            known = self._prompt_logprobs.setdefault(seq, [None])
            asked = _at_most(seq.request.sampling.prompt_logprobs, scores)
            end = min(chunk.start + chunk.count, seq.num_prompt - 1)
            # After a preemption the prompt is computed again; what is known stays.
            for position in range(max(chunk.start, len(known) - 1), end):
                token = seq.tokens[position + 1]
                known.append(token_logprobs(scores, first + position - chunk.start, token, asked))

    def _output(self, seq: Sequence) -> TokenOutput:
        request_id = seq.request.request_id
        return self.ready.setdefault(
            request_id, TokenOutput(request_id=request_id, num_cached_tokens=seq.num_cached or 0)
        )


def token_logprobs(logprobs: Logprobs, at, token: int, asked: int) -> TokenLogprobs:
    """The entry at index `at`, with the `asked` most likely tokens."""
    return TokenLogprobs(
        token_ids=(token, *logprobs.top_token_RQ[at][:asked].tolist()),
        logprobs=(float(logprobs.chosen_R[at]), *logprobs.top_RQ[at][:asked].tolist()),
        rank=int(logprobs.rank_R[at]),
    )


def _at_most(asked: int | None, logprobs: Logprobs) -> int:
    assert asked is not None
    return logprobs.top_RQ.shape[-1] if asked == -1 else asked


def _ending(seq: Sequence) -> tuple[FinishReason | None, int | None]:
    """finish_reason and stop_reason, by the newest token; None, None while it goes on."""
    last, request = seq.tokens[-1], seq.request
    if last in stop_ids(request):
        is_eos = last in request.eos_token_ids and not request.sampling.ignore_eos
        return "stop", None if is_eos else last
    if len(seq.tokens) >= seq.max_length:
        return "length", None
    return None, None
