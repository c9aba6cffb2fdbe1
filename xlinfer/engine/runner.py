"""Turns scheduled steps into calls and brings their results back, one step behind."""

from dataclasses import dataclass

import jax
import numpy as np

from xlinfer.engine.batch import Batcher
from xlinfer.engine.scheduler import Decode, Forward, Step
from xlinfer.engine.sequence import Sequence
from xlinfer.engine.slots import output_counts, recent_tokens, slot_params
from xlinfer.engine.worker import Call, Executor
from xlinfer.plan import Plan
from xlinfer.program_inputs import pack
from xlinfer.programs import Sampled
from xlinfer.sampling import Logprobs, Wanted


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A step on the device; its arrays are on their way to the host."""

    step: Step
    sampled: Sampled | None
    scores: Logprobs | None  # of the prompt tokens that follow what was read
    sums: jax.Array | None  # float32 [R, D], of the hidden states that were read for pooling

    @property
    def is_ready(self) -> bool:
        return all(x.is_ready() for x in jax.tree.leaves((self.sampled, self.scores, self.sums)))

    def fetch(self) -> tuple[Sampled | None, Logprobs | None, np.ndarray | None]:
        """As numpy arrays, waiting for the step to be done."""
        return jax.tree.map(np.asarray, (self.sampled, self.scores, self.sums))


class Runner:
    """Fills in what each step's programs take, and has `executor` run them."""

    def __init__(
        self, executor: Executor, plan: Plan, *, platform: str, vocab_size: int, seed: int
    ):
        self._run, self._plan, self._vocab_size = executor.run, plan, vocab_size
        # On CPU the host reads results where they lie. The copy would have jax call the interpreter
        # from a thread of its own, which aborts a process that is ending.
        self._copies = platform != "cpu"
        # Single-token rows have a cheaper path through attention, with other roundings; a plan
        # without decode programs wants one path for all.
        self._batcher = Batcher(plan, decode_rows_apart=plan.decode_window > 0)
        self._seeds = np.random.default_rng(seed)

    def start(self, step: Step) -> InFlight:
        """Dispatch a step; returns before the device is done."""
        return self._forward(step) if isinstance(step, Forward) else self._decode(step)

    def _forward(self, step: Forward) -> InFlight:
        for chunk in step.chunks:
            if chunk.admitted:
                self._admit(chunk.seq)
        tokens = self._plan.token_bucket(step.num_tokens)
        self._run(Call("forward", tokens, (pack(self._batcher.forward(step)),)))
        sampled = scores = sums = None
        if (sample := self._batcher.sample(step)) is not None:
            sampled = self._run(Call("sample", 0, (pack(sample),)))
            sampled = _asked(sampled, sample.wanted)
        if (score := self._batcher.score(step)) is not None:
            scores = self._run(Call("score", 0, (pack(score),)))
        if (pool := self._batcher.pool(step)) is not None:
            sums = self._run(Call("pool", 0, (pack(pool),)))
        return self._in_flight(step, sampled, scores, sums)

    def _decode(self, step: Decode) -> InFlight:
        x = self._batcher.decode(step)
        sampled = self._run(Call("decode", len(x.slot_R), (pack(x),)))
        return self._in_flight(step, _asked(sampled, x.wanted))

    def _in_flight(self, step, sampled, scores=None, sums=None) -> InFlight:
        if self._copies:
            for array in jax.tree.leaves((sampled, scores, sums)):
                array.copy_to_host_async()
        return InFlight(step=step, sampled=sampled, scores=scores, sums=sums)

    def _admit(self, seq: Sequence) -> None:
        """The sequence got its slot, for the first time or again after a preemption."""
        self._batcher.admit(seq)
        if not seq.generates:
            return  # the slot holds what sampling needs
        if seq.seed is None:  # kept through preemptions
            seq.seed = int(self._seeds.integers(2**63))
        vocab_size = self._vocab_size
        row = slot_params(seq, vocab_size, seq.seed)
        latest = np.int32(seq.tokens[-1]), recent_tokens(seq), output_counts(seq, vocab_size)
        self._run(Call("admit", 0, (np.int32(seq.held_slot), row, *latest)))
        if seq.num_encoded:
            bucket = self._plan.encode_bucket(seq.num_encoded)
            self._run(Call("encode", bucket, (pack(self._batcher.encode(seq)),)))


def _asked(sampled, wanted: Wanted) -> Sampled:
    """Without the log-probabilities when nobody wants them: they need not travel."""
    return sampled if wanted.logprobs else sampled._replace(logprobs=None)
