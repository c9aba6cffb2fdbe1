"""Which sequences run next. No jax, no clock, no I/O: tests drive it step by step.

A step is scheduled while the one before it runs, so a sequence's newest tokens may be known to
the device alone; what is scheduled depends on their number, never on their values.
"""

import heapq
from dataclasses import dataclass

from xlinfer.engine.pages import PagePool, page_keys
from xlinfer.engine.sequence import Sequence, read_positions
from xlinfer.plan import Plan

# Rows that decode together take this part of the window: their steps are longer, and whoever
# arrives waits for the windows in flight. One alone gains most from fewer dispatches.
SHARED = 4


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """`count` tokens of a sequence from position `start` on."""

    seq: Sequence
    start: int
    count: int
    samples: bool  # they reach its end and the step gives it a new token
    reads: range  # those whose hidden states are read
    admitted: bool  # it has its slot from this step on; what an encoder reads is read first


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Prefill chunks and decode rows in one ragged batch; rows of one token come first."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Every row gains up to `steps` tokens; gains[i] are promised to row i unless it stops."""

    seqs: tuple[Sequence, ...]
    gains: tuple[int, ...]
    steps: int


Step = Forward | Decode


class Scheduler:
    """Continuous batching: whoever runs goes on, whoever waits fills the rest of the step.

    Invariant: every page is free or held by running sequences, and every slot is free or some
    running sequence's (`check`).
    """

    def __init__(self, plan: Plan, pool: PagePool, *, enable_prefix_caching: bool):
        self.plan, self.pool = plan, pool
        self.running: list[Sequence] = []  # in the order they were admitted
        self.num_waiting = 0
        self.num_preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # tokens
        self._caching = enable_prefix_caching
        self._waiting: list[tuple[tuple, Sequence]] = []  # heap; finished ones linger until met
        self._slots = list(range(plan.max_num_seqs))[::-1]
        self._leaving: list[Sequence] = []  # done with the step that was scheduled last

    def add(self, seq: Sequence) -> None:
        heapq.heappush(self._waiting, (seq.order, seq))
        self.num_waiting += 1

    def finish(self, seq: Sequence) -> None:
        """It has its answer or nobody wants it any more: free what it holds."""
        seq.finished = True
        if seq.slot is not None:
            self._release(seq)
        elif not seq.done:
            self.num_waiting -= 1

    def schedule(self) -> Step | None:
        """The next step, or None when no sequence can use one. Its tokens count as computed
        and its samples as pending from here on."""
        self._release_done()
        prefilling = any(seq.prefilling for seq in self.running)
        if prefilling or self._next_waiting() is not None or not self.plan.decode_window:
            return self._forward()
        return self._decode()

    def received(self, seq: Sequence, tokens: list[int], promised: int) -> None:
        """A step in flight is done: of `promised` pending tokens these came out."""
        seq.pending -= promised
        seq.tokens += tokens
        if seq.slot is not None:
            # The newest may have ended the answer, and then its KV is never computed.
            self._remember(seq, len(seq.tokens) - 1)

    def restart_all(self) -> None:
        """Preempt every running sequence and forget all prefixes: the weights change. No step is
        in flight; what prompts whose answers have not begun were read for is read again."""
        self._release_done()
        for seq in list(self.running):
            self._preempt(seq)
        for _, seq in self._waiting:
            if len(seq.tokens) == seq.num_prompt:
                seq.unread = read_positions(seq.request)
        self.pool.forget_all()

    def check(self) -> None:
        """AssertionError when the invariant does not hold."""
        held = (page for seq in self.running for page in (*seq.pages, *seq.encoder_pages))
        self.pool.check(held)
        slots = [seq.held_slot for seq in self.running] + self._slots
        assert sorted(slots) == list(range(self.plan.max_num_seqs)), "a slot was lost"
        assert self.num_waiting == sum(not s.finished for _, s in self._waiting)

    def _in_order(self) -> list[Sequence]:
        """So that whom a step already holds is never whom it should have preempted."""
        return sorted(self.running, key=lambda seq: seq.order)

    def _next_waiting(self) -> Sequence | None:
        """The first waiting sequence, if it can be admitted now."""
        while self._waiting and self._waiting[0][1].finished:
            heapq.heappop(self._waiting)
        if not self._waiting or not self._slots:
            return None
        seq = self._waiting[0][1]
        if seq.pending:  # preempted, and its last tokens are still on their way
            return None
        hits = self._find_prefix(seq)
        needed = self._pages_for(seq.end + seq.generates) - len(hits) + self.pool.num_unheld(hits)
        needed += self._pages_for(seq.num_encoded)
        # Alone, a sequence always fits; beside others, only if its whole prompt does.
        return seq if needed <= self.pool.num_free or not self.running else None

    def _forward(self) -> Forward | None:
        budget = self.plan.max_num_batched_tokens
        chunks: dict[Sequence, Chunk] = {}
        for seq in self._in_order():
            if seq.slot is None or not seq.schedulable or not budget:
                continue  # the first: preempted in this loop
            count = min(seq.end - seq.computed, budget)
            if self._reserve(seq, seq.computed + count, chunks):
                chunks[seq] = self._advance(seq, count, admitted=False)
                budget -= count
        while budget > 0 and (seq := self._next_waiting()) is not None:
            self._admit(seq)
            count = min(seq.end - seq.computed, budget)
            if not self._reserve(seq, seq.computed + count, chunks):
                break
            chunks[seq] = self._advance(seq, count, admitted=True)
            # Encoding is as much work as a prefill, whose last may be cut; this one may not.
            budget -= count + seq.num_encoded
        if not chunks:
            return None
        self._leaving = [seq for seq in chunks if seq.done]
        return Forward(chunks=tuple(sorted(chunks.values(), key=lambda c: c.count > 1)))

    def _decode(self) -> Decode | None:
        seqs = [seq for seq in self._in_order() if seq.remaining > 0]
        if not seqs:
            return None
        window = self.plan.decode_window
        if len(seqs) > 1:
            window = max(window // SHARED, 1)
        steps = min(window, max(seq.remaining for seq in seqs))
        most = len(seqs) * self._pages_for(steps + self.plan.page_size)  # cheap, and mostly enough
        if most > self.pool.num_free:
            while steps > 1 and self._lacking(seqs, steps) > self.pool.num_free:
                steps //= 2
        gains: dict[Sequence, int] = {}
        for seq in seqs:
            gain = min(steps, seq.remaining)
            if seq.slot is not None and self._reserve(seq, seq.computed + gain, gains):
                seq.computed += gain
                seq.pending += gain
                gains[seq] = gain
        if not gains:
            return None
        return Decode(seqs=tuple(gains), gains=tuple(gains.values()), steps=steps)

    def _admit(self, seq: Sequence) -> None:
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        seq.slot = self._slots.pop()
        hits = self._find_prefix(seq)
        self.pool.share(hits)
        seq.pages = hits
        seq.encoder_pages = self.pool.take(self._pages_for(seq.num_encoded))
        seq.computed = len(hits) * self.plan.page_size
        seq.remembered = len(hits)
        self.running.append(seq)
        if seq.num_cached is None:  # counted once, however often it is preempted
            seq.num_cached = seq.computed
            if self._cacheable(seq):
                self.prefix_queries += seq.num_prompt
                self.prefix_hits += seq.num_cached

    def _advance(self, seq: Sequence, count: int, *, admitted: bool) -> Chunk:
        start, unread = seq.computed, seq.unread
        seq.computed += count
        samples = seq.computed == seq.length and seq.remaining > 0
        reads = range(max(unread.start, start), min(unread.stop, seq.computed))
        if reads:
            seq.unread = range(reads.stop, unread.stop)
        self._remember(seq, len(seq.tokens))
        seq.pending += samples
        return Chunk(
            seq=seq, start=start, count=count, samples=samples, reads=reads, admitted=admitted
        )

    def _reserve(self, seq: Sequence, length: int, scheduled: dict) -> bool:
        """Give `seq` pages for so many tokens, preempting the last in order if none are left.
        False when that is `seq` itself."""
        lacking = self._pages_for(length) - len(seq.pages)
        while lacking > self.pool.num_free:
            victim = max((s for s in self.running if s not in scheduled), key=lambda s: s.order)
            self._preempt(victim)
            if victim is seq:
                return False
        if lacking > 0:
            seq.pages += self.pool.take(lacking)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue; its KV is computed again from its tokens when its turn comes."""
        self._release(seq)
        seq.computed = seq.remembered = 0
        self.num_preemptions += 1
        self.add(seq)

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._slots.append(seq.held_slot)
        self.pool.give(seq.pages)
        self.pool.give(seq.encoder_pages)
        seq.slot, seq.pages, seq.encoder_pages = None, [], []

    def _release_done(self) -> None:
        """The next step may take what they hold: it runs after theirs."""
        for seq in self._leaving:
            if seq.slot is not None:
                self._release(seq)
        self._leaving = []

    def _pages_for(self, length: int) -> int:
        return -(-length // self.plan.page_size)

    def _lacking(self, seqs: list[Sequence], steps: int) -> int:
        return sum(
            self._pages_for(seq.computed + min(steps, seq.remaining)) - len(seq.pages)
            for seq in seqs
        )

    def _cacheable(self, seq: Sequence) -> bool:
        """What a decoder makes of its tokens hangs on the encoder's."""
        return self._caching and not seq.num_encoded

    def _find_prefix(self, seq: Sequence) -> list[int]:
        """Cached pages of its tokens; the last, and what is to be read, is left to compute."""
        most = seq.unread.start if seq.unread else seq.end - 1
        if not self._cacheable(seq) or most < self.plan.page_size:
            return []
        self._extend_keys(seq)
        return self.pool.find(seq.keys[: most // self.plan.page_size])

    def _remember(self, seq: Sequence, known: int) -> None:
        """Offer the pages that are full of computed tokens, the first `known`, as prefixes."""
        if not self._cacheable(seq):
            return
        full = min(seq.computed, known) // self.plan.page_size
        if full > seq.remembered:
            self._extend_keys(seq)
            for i in range(seq.remembered, full):
                self.pool.remember(seq.pages[i], seq.keys[i])
            seq.remembered = full

    def _extend_keys(self, seq: Sequence) -> None:
        size = self.plan.page_size
        if len(seq.tokens) // size > len(seq.keys):
            seq.keys = page_keys(seq.tokens, size, seq.keys, seq.request.cache_salt)
