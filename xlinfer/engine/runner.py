"""Puts scheduled steps on the device and brings their results back, one step behind."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from xlinfer.compile import Executables
from xlinfer.engine.batch import Batcher
from xlinfer.engine.scheduler import Decode, Forward, Step
from xlinfer.engine.sequence import Sequence
from xlinfer.engine.slots import output_counts, recent_tokens, slot_params
from xlinfer.kvcache import Cache
from xlinfer.plan import Plan
from xlinfer.programs import Sampled, pack
from xlinfer.sampling import Logprobs, Wanted, empty_slots, slot_places


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A step on the device; its arrays are on their way to the host."""

    step: Step
    sampled: Sampled | None
    scores: Logprobs | None  # of the prompt tokens that follow the step's

    @property
    def is_ready(self) -> bool:
        return all(x.is_ready() for x in jax.tree.leaves((self.sampled, self.scores)))

    def fetch(self) -> tuple[Sampled | None, Logprobs | None]:
        """As numpy arrays, waiting for the step to be done."""
        return jax.tree.map(np.asarray, (self.sampled, self.scores))


class Runner:
    """Owns everything that lives on the device: parameters, cache and slots."""

    def __init__(
        self,
        params: tuple[jax.Array, ...],
        executables: Executables,
        plan: Plan,
        mesh: Mesh,
        *,
        vocab_size: int,
        seed: int,
    ):
        self.params = params
        self._run, self._plan, self._vocab_size = executables, plan, vocab_size
        # On CPU the host reads results where they lie. The copy would have jax call the interpreter
        # from a thread of its own, which aborts a process that is ending.
        self._copies = mesh.devices.flat[0].platform != "cpu"
        self._kv: Cache = executables.allocate()
        empty = empty_slots(plan.max_num_seqs + 1, vocab_size)
        self._slots = jax.device_put(empty, slot_places(mesh, vocab_size))
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
        packed = pack(self._batcher.forward(step))
        self._kv, hidden_TD, last_RD = self._run.forward[tokens](
            self.params, self._kv, self._slots, packed
        )
        sampled = scores = None
        if (sample := self._batcher.sample(step)) is not None:
            self._slots, sampled = self._run.sample(self.params, self._slots, last_RD, pack(sample))
            sampled = _asked(sampled, sample.wanted)
        if (target_T := self._batcher.targets(step)) is not None:
            scores = self._run.score(self.params, hidden_TD, target_T, np.int32(step.num_tokens))
        return self._in_flight(step, sampled, scores)

    def _decode(self, step: Decode) -> InFlight:
        x = self._batcher.decode(step)
        self._kv, self._slots, sampled = self._run.decode[len(x.slot_R)](
            self.params, self._kv, self._slots, pack(x)
        )
        return self._in_flight(step, _asked(sampled, x.wanted), None)

    def _in_flight(self, step, sampled, scores) -> InFlight:
        if self._copies:
            for array in jax.tree.leaves((sampled, scores)):
                array.copy_to_host_async()
        return InFlight(step=step, sampled=sampled, scores=scores)

    def _admit(self, seq: Sequence) -> None:
        """The sequence got its slot, for the first time or again after a preemption."""
        if seq.seed is None:  # kept through preemptions
            seq.seed = int(self._seeds.integers(2**63))
        self._batcher.admit(seq)
        self._slots = self._run.admit(
            self._slots, np.int32(seq.held_slot), slot_params(seq, self._vocab_size, seq.seed),
            np.int32(seq.tokens[-1]), recent_tokens(seq), output_counts(seq, self._vocab_size),
        )  # fmt: skip
        if seq.num_encoded:
            encode = self._run.encode[self._plan.encode_bucket(seq.num_encoded)]
            self._kv = encode(self.params, self._kv, pack(self._batcher.encode(seq)))


def _asked(sampled: Sampled, wanted: Wanted) -> Sampled:
    """Without the log-probabilities when nobody wants them: they need not travel."""
    return sampled if wanted.logprobs else sampled._replace(logprobs=None)
