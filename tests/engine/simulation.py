"""A device and an engine in plain Python around the real Scheduler.

The device runs every step at once and in order, as the real one does, but tells its tokens some
steps later. Its KV store remembers what was written where, so a page that is shared, kept or
reused wrongly shows as soon as somebody reads it.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from xlinfer.engine.pages import PagePool, page_keys
from xlinfer.engine.scheduler import Chunk, Decode, Forward, Scheduler, Step
from xlinfer.engine.sequence import Sequence, read_positions
from xlinfer.plan import Plan, make_plan
from xlinfer.request import Request, SamplingParams

ALPHABET = 3  # tokens; few, so that prompts and answers often share prefixes


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request and how its answer goes."""

    prompt: tuple[int, ...]
    max_tokens: int = 4
    stops_after: int | None = None  # answer tokens, the last being a stop id
    priority: int = 0
    salt: str = ""
    prompt_logprobs: bool = False
    score_from: int = 0
    encoder: tuple[int, ...] = ()  # what an encoder reads; `prompt` is the decoder's then


def next_token(tokens: list[int]) -> int:
    """The fake model: like a real one, a function of everything before."""
    return hash(tuple(tokens)) % ALPHABET


def answer(job: Job) -> list[int]:
    """What a request must get, whatever else runs."""
    tokens = list(job.prompt)
    most = job.max_tokens if job.stops_after is None else min(job.stops_after, job.max_tokens)
    for _ in range(most):
        tokens.append(next_token(tokens))
    return tokens[len(job.prompt) :]


def small_plan(**changes) -> Plan:
    sizes = {
        "max_model_len": 32, "max_num_seqs": 4, "max_num_batched_tokens": 8, "page_size": 4,
        "num_pages": 33, "decode_window": 4, "max_logprobs": 0, "deterministic": False,
    }  # fmt: skip
    return make_plan(**(sizes | changes))


def sequence(number: int, job: Job, plan: Plan) -> Sequence:
    sampling = SamplingParams(
        max_tokens=job.max_tokens, prompt_logprobs=0 if job.prompt_logprobs else None
    )
    request = Request(
        request_id=str(number), prompt_token_ids=job.prompt, sampling=sampling,
        encoder_token_ids=job.encoder, priority=job.priority, cache_salt=job.salt,
        score_from=job.score_from,
    )  # fmt: skip
    return Sequence(
        request=request,
        order=(job.priority, 0.0, number),
        max_length=min(len(job.prompt) + job.max_tokens, plan.max_model_len),
        tokens=list(job.prompt),
    )


@dataclass
class Row:
    """What the device holds for a sequence in a slot."""

    tokens: list[int]
    computed: int  # positions whose KV it was told to compute, or found cached
    done: bool = False


@dataclass
class InFlight:
    step: Step
    tokens: list[list[int]]  # beside the step's chunks or sequences


@dataclass
class Simulation:
    """`step` does what Engine.step does, and checks what must hold."""

    plan: Plan
    caching: bool = True
    steps_in_flight: int = 2  # as the engine has it
    jobs: dict[Sequence, Job] = field(default_factory=dict)
    finished: dict[Sequence, list[int]] = field(default_factory=dict)
    read: dict[Sequence, list[int]] = field(default_factory=dict)  # positions told of
    in_flight: deque[InFlight] = field(default_factory=deque)
    history: list[Step] = field(default_factory=list)

    def __post_init__(self):
        self.pool = PagePool(self.plan.num_pages)
        self.scheduler = Scheduler(self.plan, self.pool, enable_prefix_caching=self.caching)
        self._rows: dict[Sequence, Row] = {}
        self._kv: dict[tuple[int, int], int] = {}  # (page, offset) -> digest of the prefix

    def add(self, job: Job) -> Sequence:
        seq = sequence(len(self.jobs), job, self.plan)
        self.jobs[seq], self.read[seq] = job, []
        self.scheduler.add(seq)
        return seq

    def abort(self, seq: Sequence) -> None:
        if not seq.finished:
            self.scheduler.finish(seq)
            self.scheduler.check()

    def restart(self) -> None:
        """What Engine.update_weights does: no KV computed so far may be read again."""
        while self.in_flight:
            self.complete()
        for seq in self.scheduler.running:
            self._rows[seq].computed = -1
        self.scheduler.restart_all()
        for seq in self.unfinished:
            if len(seq.tokens) == seq.num_prompt:
                self.read[seq] = []
        self._kv.clear()
        self.scheduler.check()

    @property
    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.jobs if not seq.finished]

    def schedule(self) -> Step | None:
        """Schedule one step, check it and run it on the device."""
        lengths = {seq: seq.length for seq in self.unfinished}
        running = [seq for seq in self.scheduler.running if not seq.done]
        preempted = self.scheduler.num_preemptions
        step = self.scheduler.schedule()
        preempted = self.scheduler.num_preemptions - preempted
        self.scheduler.check()
        if step is None:
            self._check_order(None, running, preempted)
            return None
        self.history.append(step)
        if isinstance(step, Forward):
            self._check_forward(step, lengths)
        else:
            self._check_decode(step, lengths)
        self._check_order(step, running, preempted)
        tokens = self._forward(step) if isinstance(step, Forward) else self._decode(step)
        self.in_flight.append(InFlight(step, tokens))
        return step

    def complete(self) -> None:
        """Take in the results of the oldest step in flight, as engine/outputs.py does."""
        done = self.in_flight.popleft()
        if isinstance(done.step, Forward):
            for chunk, tokens in zip(done.step.chunks, done.tokens, strict=True):
                seq = chunk.seq
                self.read[seq] += chunk.reads
                if chunk.samples:
                    self._give(seq, tokens, 1)
                elif not seq.generates and chunk.start + chunk.count == seq.end:
                    if not seq.finished:
                        self._finish(seq)
        else:
            for seq, gain, tokens in zip(done.step.seqs, done.step.gains, done.tokens, strict=True):
                self._give(seq, tokens, gain)
        self.scheduler.check()

    def step(self) -> None:
        while len(self.in_flight) < self.steps_in_flight and self.schedule():
            pass
        assert self.in_flight or not self.unfinished, "nothing runs and nobody is done"
        if self.in_flight:
            self.complete()

    def run(self, most_steps: int = 2000) -> None:
        """Until everybody has an answer, and the right one."""
        for _ in range(most_steps):
            if not self.unfinished:
                break
            self.step()
        assert not self.unfinished, f"no end after {most_steps} steps"
        while self.in_flight:
            self.complete()
        assert self.pool.num_free == self.pool.num_pages
        assert self.schedule() is None
        for seq, tokens in self.finished.items():
            assert tokens == answer(self.jobs[seq])

    def _give(self, seq: Sequence, tokens: list[int], promised: int) -> None:
        if seq.finished:
            return
        self.scheduler.received(seq, tokens, promised)
        self.check_cached(seq)
        job = self.jobs[seq]
        stopped = len(seq.tokens) - seq.num_prompt == job.stops_after
        if tokens and (stopped or len(seq.tokens) == seq.max_length):
            self._finish(seq)

    def _finish(self, seq: Sequence) -> None:
        assert seq not in self.finished
        self.finished[seq] = seq.tokens[seq.num_prompt :]
        want = read_positions(seq.request)
        assert self.read[seq] == list(want), "a hidden state was read twice, or not at all"
        self.scheduler.finish(seq)

    def check_cached(self, seq: Sequence) -> None:
        """Every page that would be found for these tokens holds them."""
        size, salt = self.plan.page_size, seq.request.cache_salt
        for i, page in enumerate(self.pool.find(page_keys(seq.tokens, size, [], salt))):
            self._check_page(page, self._digests(seq, seq.tokens[: (i + 1) * size])[i * size :])

    def _check_page(self, page: int, digests: list[int]) -> None:
        for offset, digest in enumerate(digests):
            assert self._kv.get((page, offset)) == digest, f"page {page} holds other tokens' KV"

    def _digests(self, seq: Sequence, tokens: list[int]) -> list[int]:
        """What the KV of each position must be: it depends on every token up to it."""
        digests, digest = [], hash((seq.request.cache_salt, seq.request.encoder_token_ids))
        for token in tokens:
            digest = hash((digest, token))
            digests.append(digest)
        return digests

    def _check_forward(self, step: Forward, lengths: dict[Sequence, int]) -> None:
        assert 0 < step.num_tokens <= self.plan.max_num_batched_tokens
        assert step.num_tokens == sum(chunk.count for chunk in step.chunks)
        assert len({chunk.seq for chunk in step.chunks}) == len(step.chunks)
        assert len(step.chunks) <= self.plan.max_num_seqs
        singles = [chunk.count == 1 for chunk in step.chunks]
        assert singles == sorted(singles, reverse=True), "rows of one token come first"
        for chunk in step.chunks:
            seq, end = chunk.seq, chunk.start + chunk.count
            assert chunk.count > 0 and end <= lengths[seq]
            assert all(chunk.start <= position < end for position in chunk.reads)
            assert chunk.samples == (end == lengths[seq] < seq.max_length)
            assert chunk.admitted or self._rows[seq].computed >= 0, "it has no slot"

    def _check_decode(self, step: Decode, lengths: dict[Sequence, int]) -> None:
        assert 0 < len(step.seqs) == len(set(step.seqs)) <= self.plan.max_num_seqs
        assert 0 < step.steps <= self.plan.decode_window
        assert max(step.gains) == step.steps
        for seq, gain in zip(step.seqs, step.gains, strict=True):
            assert gain == min(step.steps, seq.max_length - lengths[seq]) > 0

    def _check_order(self, step: Step | None, before: list[Sequence], preempted: int) -> None:
        """The first waiting are admitted first, the last running are preempted first. One of
        these may be back at once, when others hold the same prefix."""
        chunks = step.chunks if isinstance(step, Forward) else ()
        admitted = {chunk.seq for chunk in chunks if chunk.admitted}
        running = self.scheduler.running
        waiting = [seq for seq in self.unfinished if seq not in running and not seq.done]
        assert all(a.order < w.order for a in admitted for w in waiting)
        victims = [seq for seq in before if seq not in running or seq in admitted]
        assert len(victims) == preempted
        stayed = [seq for seq in before if seq not in victims]
        assert all(s.order < v.order for s in stayed for v in victims)
        for seq in victims:
            if seq not in admitted:
                assert not seq.pages and not seq.encoder_pages and seq.slot is None
                self._rows[seq].computed = -1

    def _forward(self, step: Forward) -> list[list[int]]:
        for chunk in step.chunks:
            if chunk.admitted:
                self._admit(chunk)
        writes = Counter()
        for chunk in step.chunks:
            seq, row = chunk.seq, self._rows[chunk.seq]
            assert chunk.start == row.computed, "a gap, or a token computed twice"
            row.computed += chunk.count
            digests = self._digests(seq, row.tokens)
            for position in range(chunk.start, row.computed):
                # Past its stop a row computes what nobody will read.
                known = position < len(digests)
                writes[self._write(seq, position, digests[position] if known else 0)] += 1
        assert not writes or max(writes.values()) == 1, "two rows wrote to one place"
        for chunk in step.chunks:
            self._read(chunk.seq, chunk.start + chunk.count)
        return [self._sample(chunk.seq) if chunk.samples else [] for chunk in step.chunks]

    def _decode(self, step: Decode) -> list[list[int]]:
        results: list[list[int]] = [[] for _ in step.seqs]
        for seq, gain in zip(step.seqs, step.gains, strict=True):
            row = self._rows[seq]
            assert row.done or row.computed == len(row.tokens) - 1
            row.computed += gain
        for _ in range(step.steps):
            for seq, result in zip(step.seqs, results, strict=True):
                row = self._rows[seq]
                if not row.done:
                    last = len(row.tokens) - 1
                    self._write(seq, last, self._digests(seq, row.tokens)[last])
                    self._read(seq, last + 1)
                    result += self._sample(seq)
        for gain, result in zip(step.gains, results, strict=True):
            assert len(result) <= gain
        return results

    def _admit(self, chunk: Chunk) -> None:
        seq = chunk.seq
        assert seq.length - chunk.samples == len(seq.tokens), "its last tokens are not known yet"
        assert chunk.start % self.plan.page_size == 0
        if not self.caching:
            assert chunk.start == 0
        self._rows[seq] = Row(list(seq.tokens), computed=chunk.start)
        size = self.plan.page_size
        for position, digest in enumerate(self._encoded(seq)):
            self._kv[seq.encoder_pages[position // size], position % size] = digest

    def _encoded(self, seq: Sequence) -> list[int]:
        """What the encoder makes of each token: it depends on all of them."""
        read = seq.request.encoder_token_ids
        return [hash((read, position)) for position in range(len(read))]

    def _write(self, seq: Sequence, position: int, digest: int) -> tuple[int, int]:
        page = seq.pages[position // self.plan.page_size]
        assert page > 0
        place = (page, position % self.plan.page_size)
        self._kv[place] = digest
        return place

    def _read(self, seq: Sequence, end: int) -> None:
        row, size = self._rows[seq], self.plan.page_size
        if not row.done:
            digests = self._digests(seq, row.tokens[:end])
            assert len(digests) == end
            for i in range(0, end, size):
                self._check_page(seq.pages[i // size], digests[i : i + size])
            encoded = self._encoded(seq)
            for i in range(0, len(encoded), size):
                self._check_page(seq.encoder_pages[i // size], encoded[i : i + size])

    def _sample(self, seq: Sequence) -> list[int]:
        row, job = self._rows[seq], self.jobs[seq]
        if row.done:
            return []
        row.tokens.append(next_token(row.tokens))
        gained = len(row.tokens) - seq.num_prompt
        row.done = gained == job.stops_after or len(row.tokens) == seq.max_length
        return row.tokens[-1:]
