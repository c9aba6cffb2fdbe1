"""The scheduler under every kind of load, on a device in plain Python (simulation.py)."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.simulation import (
    ALPHABET,
    Job,
    Simulation,
    answer,
    sequence,
    small_plan,
)
from xlinfer.engine.pages import PagePool
from xlinfer.engine.scheduler import Chunk, Decode, Forward, Scheduler

LONGEST = 24  # tokens of one sequence in the random runs
LARGE = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example)


@st.composite
def plans(draw):
    page_size, rows = draw(st.sampled_from([1, 2, 4, 5])), draw(st.integers(1, 4))
    per_seq, encodes = -(-LONGEST // page_size), draw(st.sampled_from([False, False, True]))
    per_seq *= 2 if encodes else 1
    return small_plan(
        max_model_len=LONGEST,
        max_num_seqs=rows,
        max_num_batched_tokens=rows + draw(st.integers(0, 9)),
        page_size=page_size,
        num_pages=1 + per_seq + draw(st.integers(0, 2 * per_seq)),
        decode_window=draw(st.sampled_from([0, 1, 8, 32])),
        encodes=encodes,
    )


@st.composite
def jobs(draw, earlier: list[Job], encodes: bool):
    """A fresh prompt, or one that goes on where an earlier request or its answer ended."""
    prompt = draw(st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=14))
    salt = draw(st.sampled_from(["", "", "other"]))
    if earlier and draw(st.booleans()):
        before = draw(st.sampled_from(earlier))
        whole = (*before.prompt, *answer(before))
        kept = draw(st.integers(1, len(whole)))
        prompt, salt = [*whole[:kept], *prompt[:3]], before.salt
    prompt = tuple(prompt[: LONGEST - 1])
    prompt_logprobs = not encodes and draw(st.sampled_from([False, False, True]))
    read = st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=LONGEST)
    return Job(
        prompt=prompt,
        max_tokens=draw(st.integers(0 if prompt_logprobs else 1, LONGEST - len(prompt))),
        stops_after=draw(st.none() | st.integers(1, 8)),
        priority=draw(st.sampled_from([0, 0, 0, -1, 1])),
        salt=salt,
        prompt_logprobs=prompt_logprobs,
        score_from=draw(st.integers(0, len(prompt) - 1)) if prompt_logprobs else 0,
        encoder=tuple(draw(read)) if encodes else (),
    )


EVENTS = ("add",) * 6 + ("step",) * 4 + ("schedule",) * 2 + ("abort",) * 2 + ("restart",)


def random_run(data: st.DataObject, most_events: int) -> None:
    simulation = Simulation(
        data.draw(plans()),
        caching=data.draw(st.sampled_from([True, True, False])),
        steps_in_flight=data.draw(st.integers(1, 3)),
    )
    added: list[Job] = []
    for _ in range(data.draw(st.integers(1, most_events))):
        match data.draw(st.sampled_from(EVENTS)):
            case "add":
                encodes = bool(simulation.plan.encode_buckets)
                added.append(data.draw(jobs(added, encodes)))
                simulation.add(added[-1])
            case "step" if simulation.unfinished:
                simulation.step()
            case "schedule" if len(simulation.in_flight) < simulation.steps_in_flight:
                simulation.schedule()
            case "abort" if simulation.jobs:
                simulation.abort(data.draw(st.sampled_from(list(simulation.jobs))))
            case "restart":
                simulation.restart()
    simulation.run()


@settings(max_examples=250, suppress_health_check=LARGE)
@given(st.data())
def test_random_load(data):
    random_run(data, most_events=30)


@pytest.mark.slow
@settings(max_examples=1_000, suppress_health_check=LARGE)
@given(st.data())
def test_random_load_for_long(data):
    random_run(data, most_events=80)


PROMPT = (0, 1, 2, 1, 0, 0, 1, 2, 2, 1)  # two full pages of 4 and a half


def chunks(simulation: Simulation) -> list[tuple[str, int, int, bool]]:
    """The next step's rows as (request id, start, count, samples), in order of request."""
    step = simulation.schedule()
    assert isinstance(step, Forward)
    rows = [(c.seq.request.request_id, c.start, c.count, c.samples) for c in step.chunks]
    return sorted(rows)


def test_a_long_prompt_is_chunked_beside_decoding_rows():
    simulation = Simulation(small_plan(max_num_batched_tokens=4, decode_window=16))
    simulation.add(Job(prompt=(1,), max_tokens=9))
    assert chunks(simulation) == [("0", 0, 1, True)]
    simulation.complete()
    simulation.add(Job(prompt=PROMPT))
    assert chunks(simulation) == [("0", 1, 1, True), ("1", 0, 3, False)]
    assert chunks(simulation) == [("0", 2, 1, True), ("1", 3, 3, False)]
    assert chunks(simulation) == [("0", 3, 1, True), ("1", 6, 3, False)]
    step = simulation.schedule()  # the prompt's last token is like a sampled one
    assert isinstance(step, Decode) and step.gains == (4, 4)
    simulation.run()


def test_a_window_is_decoded_when_nobody_can_be_admitted():
    simulation = Simulation(small_plan(max_num_seqs=2, decode_window=16))
    first, second = (
        simulation.add(Job(prompt=(1,), max_tokens=9)),
        simulation.add(Job(prompt=(2,), max_tokens=3)),
    )
    assert len(chunks(simulation)) == 2
    step = simulation.schedule()
    assert isinstance(step, Decode)
    assert (step.seqs, step.gains, step.steps) == ((first, second), (4, 2), 4)
    simulation.complete()
    simulation.complete()
    assert second.finished
    step = simulation.schedule()
    assert isinstance(step, Decode) and step.gains == (4,)  # all it may still gain
    simulation.add(Job(prompt=(0,)))
    assert chunks(simulation)[-1] == ("2", 0, 1, True)
    simulation.run()


def test_a_shared_prefix_is_computed_once_even_within_one_step():
    """The second of them waits for nothing: its first two pages are being computed beside it."""
    simulation = Simulation(small_plan(max_num_batched_tokens=64))
    for _ in range(4):
        simulation.add(Job(prompt=PROMPT))
    assert chunks(simulation) == [
        ("0", 0, 10, True), ("1", 8, 2, True), ("2", 8, 2, True), ("3", 8, 2, True),
    ]  # fmt: skip
    held = Counter(page for seq in simulation.scheduler.running for page in seq.pages)
    assert sorted(held.values()) == [1, 1, 1, 1, 4, 4]
    scheduler = simulation.scheduler
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (40, 24)
    assert [seq.num_cached for seq in simulation.jobs] == [0, 8, 8, 8]
    simulation.run()


def test_one_token_at_least_is_computed():
    """Else there would be no hidden state to sample from."""
    simulation = Simulation(small_plan())
    simulation.add(Job(prompt=PROMPT[:8], max_tokens=1))
    simulation.run()
    simulation.add(Job(prompt=PROMPT[:8], max_tokens=1))
    assert chunks(simulation) == [("1", 4, 4, True)]
    simulation.run()


@pytest.mark.parametrize(
    ("later", "start"),
    [
        (Job(prompt=PROMPT), 8),
        (Job(prompt=PROMPT, salt="b"), 0),
        (Job(prompt=PROMPT, prompt_logprobs=True), 0),  # each token's are asked for
        (Job(prompt=PROMPT, prompt_logprobs=True, score_from=8), 4),  # position 7 tells of 8
        (Job(prompt=PROMPT, prompt_logprobs=True, score_from=9), 8),
        (Job(prompt=(1, *PROMPT[1:])), 0),
        (Job(prompt=(*PROMPT[:4], 1, *PROMPT[5:])), 4),
    ],
    ids=["same", "salt", "scored", "scored from 8", "scored from 9", "first page", "second page"],
)
def test_who_shares(later, start):
    simulation = Simulation(small_plan(max_num_batched_tokens=16))
    simulation.add(Job(prompt=PROMPT))
    simulation.run()
    simulation.add(later)
    assert chunks(simulation) == [("1", start, 10 - start, True)]
    simulation.run()


def test_what_is_only_scored_frees_its_place_for_the_next_step():
    """Two steps in flight need twice the rows otherwise; and the last token tells of nothing."""
    simulation = Simulation(small_plan(max_num_batched_tokens=16, max_num_seqs=2))
    for first in range(3):
        simulation.add(Job(prompt=(first, *PROMPT[1:4]), max_tokens=0, prompt_logprobs=True))
    assert chunks(simulation) == [("0", 0, 3, False), ("1", 0, 3, False)]
    assert chunks(simulation) == [("2", 0, 3, False)]
    simulation.run()


@pytest.mark.parametrize("decode_window", [0, 1, 16])
@pytest.mark.parametrize("stops_after", range(1, 7))
def test_a_next_turn_finds_what_was_computed_and_no_more(stops_after, decode_window):
    """The stop id itself was never fed to the model: a page that it fills is not cached."""
    simulation = Simulation(small_plan(max_num_batched_tokens=16, decode_window=decode_window))
    first = Job(prompt=PROMPT, max_tokens=12, stops_after=stops_after)
    simulation.add(first)
    simulation.run()
    simulation.add(Job(prompt=(*PROMPT, *answer(first), 1, 2)))
    computed = len(PROMPT) + stops_after - 1
    assert chunks(simulation)[0][1] == computed // 4 * 4
    simulation.run()


class TestEncoders:
    """What an encoder makes of a prompt has pages of its own, from admission on."""

    def test_pages_are_held_while_it_runs(self):
        simulation = Simulation(small_plan(encodes=True))
        seq = simulation.add(Job(prompt=(0,), encoder=PROMPT[:9], max_tokens=9))
        simulation.schedule()
        assert (len(seq.encoder_pages), len(seq.pages)) == (3, 1)
        assert not set(seq.encoder_pages) & set(seq.pages)
        simulation.run()
        assert not seq.encoder_pages and simulation.pool.num_free == simulation.pool.num_pages

    def test_one_is_admitted_only_with_pages_for_its_prompt(self):
        """Of 16 pages the first takes 9, and the second wants 9."""
        simulation = Simulation(small_plan(encodes=True, num_pages=17))
        first, second = (
            simulation.add(Job(prompt=(0,), encoder=(1,) * 32, max_tokens=2)) for _ in range(2)
        )
        simulation.schedule()
        assert first.slot is not None and second.slot is None and not second.encoder_pages
        simulation.run()

    def test_a_step_reads_no_more_than_a_step_has(self):
        """8 tokens: one that is encoded and begins takes 7; one longer than a step goes alone."""
        simulation = Simulation(small_plan(encodes=True))
        seqs = [
            simulation.add(Job(prompt=(0,), encoder=(1,) * n, max_tokens=1)) for n in (6, 20, 3, 3)
        ]
        admitted = lambda: [seq for seq in seqs if seq.slot is not None]
        simulation.schedule()
        assert admitted() == seqs[:2]  # the second began where one token was left
        simulation.schedule()
        assert admitted() == seqs
        simulation.run()

    def test_one_that_is_preempted_is_encoded_again(self):
        simulation = Simulation(small_plan(encodes=True, num_pages=17))
        jobs = [Job(prompt=(0,), encoder=(n,) * 16, max_tokens=24) for n in range(2)]
        for job in jobs:
            simulation.add(job)
        simulation.run()
        assert simulation.scheduler.num_preemptions > 0

    def test_decoders_share_no_prefix(self):
        """The same tokens behind other prompts are other keys and values."""
        simulation = Simulation(small_plan(encodes=True))
        for n in range(2):
            simulation.add(Job(prompt=PROMPT, encoder=(n,), max_tokens=4))
            simulation.run()
        assert simulation.scheduler.prefix_queries == simulation.scheduler.prefix_hits == 0


def test_abort_frees_at_once():
    simulation = Simulation(small_plan())
    running, waiting = simulation.add(Job(prompt=PROMPT)), simulation.add(Job(prompt=PROMPT))
    simulation.schedule()
    assert simulation.pool.num_free < simulation.pool.num_pages
    simulation.abort(waiting)
    assert simulation.scheduler.num_waiting == 0
    simulation.abort(running)  # its step is still in flight
    assert simulation.pool.num_free == simulation.pool.num_pages
    assert simulation.schedule() is None
    simulation.complete()
    assert not simulation.finished


def test_lower_priority_value_and_earlier_arrival_run_first():
    simulation = Simulation(small_plan(max_num_seqs=1, decode_window=0))
    for priority in (1, 0, 0, -1):
        simulation.add(Job(prompt=(1,), max_tokens=1, priority=priority))
    simulation.run()
    assert [seq.request.request_id for seq in simulation.finished] == ["3", "1", "2", "0"]


@pytest.mark.parametrize("decode_window", [0, 4])
@pytest.mark.parametrize("length", range(5, 11))
def test_the_last_in_order_is_preempted_whenever_it_was_admitted(length, decode_window):
    """Two rows and pages for less: the urgent one came later and must never lose its own."""
    plan = small_plan(
        max_num_seqs=2, max_num_batched_tokens=32, num_pages=9, decode_window=decode_window
    )
    simulation = Simulation(plan)
    patient = simulation.add(Job(prompt=PROMPT, max_tokens=16))
    simulation.schedule()
    urgent = simulation.add(Job(prompt=PROMPT[:-length:-1], max_tokens=21, priority=-1))
    simulation.schedule()
    while not simulation.finished:
        simulation.step()
        assert urgent.finished or urgent.slot is not None
    assert simulation.scheduler.num_preemptions > 0
    simulation.run()
    assert list(simulation.finished) == [urgent, patient]


def test_a_preempted_request_counts_its_cached_tokens_once():
    simulation = Simulation(small_plan(max_num_seqs=2, max_num_batched_tokens=32, num_pages=9))
    for prompt in (PROMPT, PROMPT[::-1]):
        simulation.add(Job(prompt=prompt, max_tokens=16))
    simulation.run()
    scheduler = simulation.scheduler
    assert scheduler.num_preemptions > 0
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (20, 0)
    assert [seq.num_cached for seq in simulation.jobs] == [0, 0]


def test_new_weights_find_no_old_prefix():
    simulation = Simulation(small_plan(max_num_batched_tokens=32))
    simulation.add(Job(prompt=PROMPT, max_tokens=8))
    simulation.step()
    simulation.restart()
    simulation.add(Job(prompt=PROMPT, max_tokens=8))
    starts = [start for _, start, _, _ in chunks(simulation)]
    assert starts == [0, 8]
    simulation.run()


class Counted(int):
    """An arrival number that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other):
        Counted.comparisons += 1
        return int(self) < int(other)

    def __eq__(self, other):
        Counted.comparisons += 1
        return int(self) == int(other)

    __hash__ = int.__hash__


@pytest.mark.parametrize("caching", [True, False])
def test_a_step_costs_no_more_with_ten_thousand_waiting(caching):
    plan = small_plan(max_num_seqs=8, max_num_batched_tokens=64, num_pages=200)

    def comparisons(num_waiting: int) -> int:
        scheduler = Scheduler(plan, PagePool(plan.num_pages), enable_prefix_caching=caching)
        for number in range(num_waiting):
            seq = sequence(number, Job(prompt=(number % 3, 1), max_tokens=4), plan)
            seq.order = (0, 0.0, Counted(number))
            scheduler.add(seq)
        Counted.comparisons, steps = 0, 40
        for _ in range(steps):
            step = scheduler.schedule()
            rows = step.chunks if isinstance(step, Forward) else step.seqs if step else ()
            for row in rows:
                seq = row.seq if isinstance(row, Chunk) else row
                scheduler.received(seq, [0] * seq.pending, seq.pending)
                if not seq.remaining:
                    scheduler.finish(seq)
        return Counted.comparisons // steps

    # A heap of 10,000 is four levels deeper than one of 1,000; all else is equal.
    assert comparisons(10_000) < 1.5 * comparisons(1_000) < 1_000
