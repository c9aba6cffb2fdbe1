"""Results of finished steps -> what each request is told."""

import numpy as np

from xlinfer.engine.runner import InFlight
from xlinfer.engine.scheduler import Chunk, Forward, Scheduler
from xlinfer.engine.sequence import Sequence, read_positions
from xlinfer.request import FinishReason, TokenLogprobs, TokenOutput
from xlinfer.sampling import Logprobs


class Outputs:
    """Collects each request's news until `take` hands it out."""

    def __init__(self):
        self.prompt_tokens = self.generation_tokens = 0
        self.ready: dict[str, TokenOutput] = {}
        # What was read of prompts, until it is told.
        self._prompt_logprobs: dict[Sequence, list[TokenLogprobs | None]] = {}
        self._sums: dict[Sequence, np.ndarray] = {}  # float64: chunks are cut where load says

    def take(self) -> list[TokenOutput]:
        ready, self.ready = list(self.ready.values()), {}
        return ready

    def drop(self, seq: Sequence) -> None:
        """Nobody wants its news any more."""
        self.ready.pop(seq.request.request_id, None)
        self._prompt_logprobs.pop(seq, None)
        self._sums.pop(seq, None)

    def forget_prompts(self) -> None:
        """What was read of prompts so far is read again."""
        self._prompt_logprobs.clear()
        self._sums.clear()

    def receive(self, done: InFlight, scheduler: Scheduler) -> list[Sequence]:
        """Give every sequence of the step its tokens; returns those that are finished."""
        sampled, scores, sums = done.fetch()
        finished: list[Sequence | None] = []
        if isinstance(done.step, Forward):
            if scores is not None:
                self._note_scores(done.step, scores)
            if sums is not None:
                self._note_sums(done.step, sums)
            sampling = [chunk.seq for chunk in done.step.chunks if chunk.samples]
            promised = [1] * len(sampling)
            finished += [self._finish_read(chunk) for chunk in done.step.chunks]
        else:
            sampling, promised = done.step.seqs, done.step.gains
        if sampled is not None:
            # As Python lists at once: an index into a numpy array costs as much as the rest.
            counts, tokens = sampled.count_R.tolist(), sampled.token_WR.T.tolist()
            for row, seq in enumerate(sampling):
                if not seq.finished:
                    scheduler.received(seq, tokens[row][: counts[row]], promised[row])
                    finished.append(self._tell(seq, counts[row], sampled.logprobs, row))
        return [seq for seq in finished if seq is not None]

    def _tell(
        self, seq: Sequence, count: int, logprobs: Logprobs | None, row: int
    ) -> Sequence | None:
        """Pass on the newest `count` tokens; the sequence itself if they end it."""
        if not count:
            return None
        out, tokens = self._output(seq), seq.tokens[-count:]
        if len(seq.tokens) - count == seq.num_prompt:
            self.prompt_tokens += seq.num_encoded or seq.num_prompt
            if seq.request.sampling.prompt_logprobs is not None:
                out.prompt_logprobs = self._take_prompt_logprobs(seq)
        self.generation_tokens += count
        out.token_ids += tokens
        if (asked := seq.request.sampling.logprobs) is not None:
            assert logprobs is not None
            new = [
                token_logprobs(logprobs, (w, row), token, asked) for w, token in enumerate(tokens)
            ]
            out.logprobs = (out.logprobs or []) + new
        out.finish_reason, out.stop_reason = _ending(seq)
        return seq if out.finish_reason else None

    def _finish_read(self, chunk: Chunk) -> Sequence | None:
        """The chunk's sequence, if all it asked for is told by its prompt, which is now read."""
        seq = chunk.seq
        if seq.finished or seq.generates or chunk.start + chunk.count < seq.end:
            return None
        out, request = self._output(seq), seq.request
        if request.pooling:
            mean = self._sums.pop(seq) / len(read_positions(request))
            out.pooled = mean.astype(np.float32)
        else:
            out.prompt_logprobs = self._take_prompt_logprobs(seq)
        out.finish_reason = "length"
        self.prompt_tokens += seq.num_prompt
        return seq

    def _note_sums(self, step: Forward, sums_RD: np.ndarray) -> None:
        pooled = [c.seq for c in step.chunks if c.reads and c.seq.request.pooling]
        for r, seq in enumerate(pooled):
            if not seq.finished:
                self._sums[seq] = sums_RD[r] + self._sums.get(seq, np.float64(0))

    def _note_scores(self, step: Forward, scores: Logprobs) -> None:
        i = 0
        for seq, reads in ((chunk.seq, chunk.reads) for chunk in step.chunks if chunk.reads):
            if seq.request.pooling:
                continue
            if not seq.finished:
                known = self._prompt_logprobs.setdefault(seq, [])
                asked = seq.request.sampling.prompt_logprobs
                assert asked is not None
                following = seq.tokens[reads.start + 1 : reads.stop + 1]
                known += [
                    token_logprobs(scores, at, token, asked)
                    for at, token in enumerate(following, i)
                ]
            i += len(reads)

    def _take_prompt_logprobs(self, seq: Sequence) -> list[TokenLogprobs | None]:
        known = self._prompt_logprobs.pop(seq, [])
        return known if seq.request.score_from else [None, *known]

    def _output(self, seq: Sequence) -> TokenOutput:
        request_id = seq.request.request_id
        if (out := self.ready.get(request_id)) is None:
            out = TokenOutput(request_id=request_id, num_cached_tokens=seq.num_cached or 0)
            self.ready[request_id] = out
        return out


def token_logprobs(logprobs: Logprobs, at, token: int, asked: int) -> TokenLogprobs:
    """The entry at index `at`, with the `asked` most likely tokens; -1: all."""
    most = logprobs.top_RQ.shape[-1] if asked == -1 else asked
    return TokenLogprobs(
        token_ids=(token, *logprobs.top_token_RQ[at][:most].tolist()),
        logprobs=(float(logprobs.chosen_R[at]), *logprobs.top_RQ[at][:most].tolist()),
        rank=int(logprobs.rank_R[at]),
    )


def _ending(seq: Sequence) -> tuple[FinishReason | None, int | None]:
    """finish_reason and stop_reason, by the newest token; None, None while it goes on."""
    last, request = seq.tokens[-1], seq.request
    if last in seq.stop_ids:
        is_eos = last in request.eos_token_ids and not request.sampling.ignore_eos
        return "stop", None if is_eos else last
    if len(seq.tokens) >= seq.max_length:
        return "length", None
    return None, None
