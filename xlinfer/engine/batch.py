"""A scheduled step as the arrays its program takes. Host-side; numpy alone."""

from collections.abc import Iterable

import numpy as np

from xlinfer.engine.scheduler import Decode, Forward
from xlinfer.engine.sequence import Sequence
from xlinfer.engine.slots import needs
from xlinfer.plan import Plan
from xlinfer.program_inputs import (
    FROM_DEVICE,
    DecodeInput,
    Encoded,
    EncodeInput,
    ForwardInput,
    PoolInput,
    SampleInput,
    ScoreInput,
)
from xlinfer.sampling import Wanted


class Batcher:
    """Keeps the running sequences' page tables as one array, written as they grow.

    Padding rows carry the one slot past the sequences', which nobody holds.
    """

    def __init__(self, plan: Plan, *, decode_rows_apart: bool):
        self._plan = plan
        self._apart = decode_rows_apart  # give single-token rows to the decode path of attention
        self._pages_ZM = np.zeros((plan.max_num_seqs + 1, plan.pages_per_seq), np.int32)
        self._encoder_pages_ZM = np.zeros_like(self._pages_ZM)
        self._encoder_len_Z = np.zeros(plan.max_num_seqs + 1, np.int32)
        self._written = [0] * plan.max_num_seqs
        self._needs_ZW = np.zeros((plan.max_num_seqs, len(Wanted._fields)), bool)

    def admit(self, seq: Sequence) -> None:
        """The sequence has its slot from here on."""
        self._written[seq.held_slot] = 0
        self._encoder_pages_ZM[seq.held_slot, : len(seq.encoder_pages)] = seq.encoder_pages
        self._encoder_len_Z[seq.held_slot] = seq.num_encoded
        self._needs_ZW[seq.held_slot] = needs(seq.request.sampling)

    def encode(self, seq: Sequence) -> EncodeInput:
        """Its encoder's input, and where in its pages the keys and values of each token go."""
        tokens, size = np.array(seq.request.encoder_token_ids, np.int32), self._plan.page_size
        token_T, page_T, offset_T = np.zeros((3, self._plan.encode_bucket(len(tokens))), np.int32)
        here, pos_T = slice(0, len(tokens)), np.arange(len(tokens))
        token_T[here], offset_T[here] = tokens, pos_T % size
        page_T[here] = np.array(seq.encoder_pages, np.int32)[pos_T // size]
        return EncodeInput(token_T, page_T, offset_T, np.int32(len(tokens)))

    def forward(self, step: Forward) -> ForwardInput:
        plan, chunks = self._plan, step.chunks
        self._write_pages(chunk.seq for chunk in chunks)
        T, rows = plan.token_bucket(step.num_tokens), len(chunks)
        token_T, pos_T, slot_T, page_T, offset_T = np.zeros((5, T), np.int32)
        slot_T[:] = plan.max_num_seqs
        kv_len_R = np.zeros(plan.max_num_seqs, np.int32)
        start_R = np.full(plan.max_num_seqs + 1, step.num_tokens, np.int32)
        pages_RM = np.zeros((plan.max_num_seqs, plan.pages_per_seq), np.int32)
        slots = [chunk.seq.held_slot for chunk in chunks]
        pages_RM[:rows] = self._pages_ZM[slots]
        t = 0
        for r, (seq, start, count) in enumerate((c.seq, c.start, c.count) for c in chunks):
            start_R[r], kv_len_R[r] = t, start + count
            here = slice(t, t + count)
            token_T[here] = _tokens(seq, start, count)
            pos_T[here] = np.arange(start, start + count)
            slot_T[here] = seq.held_slot
            t += count
        here = slice(0, t)
        page_T[here] = self._pages_ZM[slot_T[here], pos_T[here] // plan.page_size]
        offset_T[here] = pos_T[here] % plan.page_size
        single = sum(chunk.count == 1 for chunk in chunks) if self._apart else 0
        return ForwardInput(
            token_T, pos_T, page_T, offset_T, slot_T, pages_RM, kv_len_R, start_R,
            np.int32(single), np.int32(rows), self._encoded(slots, plan.max_num_seqs),
        )  # fmt: skip

    def sample(self, step: Forward) -> SampleInput | None:
        """For the chunks that reach their sequence's end; None when there is none."""
        row_R = [r for r, chunk in enumerate(step.chunks) if chunk.samples]
        if not row_R:
            return None
        rows = self._plan.max_num_seqs
        chunks = [step.chunks[r] for r in row_R]
        return SampleInput(
            self._slots([chunk.seq for chunk in chunks], rows),
            _padded(row_R, rows),
            _padded([chunk.start + chunk.count for chunk in chunks], rows),
            self._wanted(chunk.seq for chunk in chunks),
        )

    def decode(self, step: Decode) -> DecodeInput:
        self._write_pages(step.seqs)
        rows = self._plan.decode_bucket(len(step.seqs))
        slot_R = self._slots(step.seqs, rows)
        before_R = [s.length - gain for s, gain in zip(step.seqs, step.gains, strict=True)]
        return DecodeInput(
            slot_R, _padded(before_R, rows), self._pages_ZM[slot_R],
            np.int32(len(step.seqs)), np.int32(step.steps), self._wanted(step.seqs),
            self._encoded([seq.held_slot for seq in step.seqs], rows),
        )  # fmt: skip

    def score(self, step: Forward) -> ScoreInput | None:
        """The hidden states that are read, chunk after chunk, and the prompt tokens that follow
        them; None when there are none."""
        row_S, token_S, tops, t = [], [], 0, 0
        for chunk in step.chunks:
            if (reads := chunk.reads) and chunk.seq.request.pooling is None:
                first = t + reads.start - chunk.start
                row_S += range(first, first + len(reads))
                request = chunk.seq.request
                token_S += request.prompt_token_ids[reads.start + 1 : reads.stop + 1]
                tops |= request.sampling.prompt_logprobs != 0
            t += chunk.count
        if not row_S:
            return None
        size = self._plan.max_num_batched_tokens
        return ScoreInput(
            _padded(row_S, size), _padded(token_S, size), np.int32(len(row_S)), np.int32(tops)
        )

    def pool(self, step: Forward) -> PoolInput | None:
        """Where the hidden states lie that are pooled, a row each chunk; None when there are
        none."""
        spans, t = [], 0
        for chunk in step.chunks:
            if (reads := chunk.reads) and chunk.seq.request.pooling:
                first = t + reads.start - chunk.start
                spans.append((first, first + len(reads)))
            t += chunk.count
        if not spans:
            return None
        starts, ends = zip(*spans, strict=True)
        rows = self._plan.max_num_seqs
        return PoolInput(_padded([*starts], rows), _padded([*ends], rows), np.int32(len(spans)))

    def _write_pages(self, seqs: Iterable[Sequence]) -> None:
        for seq in seqs:
            slot = seq.held_slot
            if (done := self._written[slot]) < len(seq.pages):
                self._pages_ZM[slot, done : len(seq.pages)] = seq.pages[done:]
                self._written[slot] = len(seq.pages)

    def _encoded(self, slots: list[int], rows: int) -> Encoded | None:
        if not self._plan.encode_buckets:
            return None
        slot_R = _padded(slots, rows, self._plan.max_num_seqs)  # padding's, which has no tokens
        return Encoded(self._encoder_pages_ZM[slot_R], self._encoder_len_Z[slot_R])

    def _slots(self, seqs: Iterable[Sequence], rows: int) -> np.ndarray:
        return _padded([seq.held_slot for seq in seqs], rows, self._plan.max_num_seqs)

    def _wanted(self, seqs: Iterable[Sequence]) -> Wanted:
        return Wanted(*self._needs_ZW[[seq.held_slot for seq in seqs]].any(0).astype(np.int32))


def _tokens(seq: Sequence, start: int, count: int) -> list[int]:
    known = seq.tokens[start : start + count]
    return known + [FROM_DEVICE] * (count - len(known))


def _padded(values: list, size: int, fill: int = 0) -> np.ndarray:
    return np.array(values + [fill] * (size - len(values)), np.int32)
