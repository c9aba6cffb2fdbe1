import hypothesis.strategies as st
from hypothesis import given

from xlinfer.engine.placement import ANSWER, Placement
from xlinfer.request import Request, SamplingParams

PAGE = 4


def placement(replicas: int, *, num_pages: int = 512, prefix_caching: bool = True) -> Placement:
    return Placement(replicas, page_size=PAGE, num_pages=num_pages, prefix_caching=prefix_caching)


def request(name: object, tokens: list[int], salt: str = "") -> Request:
    return Request(
        request_id=str(name), prompt_token_ids=tuple(tokens), sampling=SamplingParams(),
        cache_salt=salt,
    )  # fmt: skip


def prompt(start: int, pages: int) -> list[int]:
    return [start + i for i in range(pages * PAGE)]


def test_unlike_prompts_are_spread():
    placed = placement(3)
    assert [placed.place(request(i, prompt(100 * i, 2))) for i in range(6)] == [0, 1, 2] * 2


def test_prompts_that_begin_alike_stay_together_until_it_costs_more():
    placed, shared = placement(2), prompt(0, 200)
    homes = [placed.place(request(i, [*shared, 1000 + i])) for i in range(8)]
    # The first costs 801 + ANSWER and the others 1 + ANSWER; the prefix anew would cost 1600.
    assert homes == [0, 0, 0, 0, 1, 1, 1, 1]


def test_another_salt_shares_no_prefix():
    placed, shared = placement(2), prompt(0, 200)
    assert placed.place(request("a", shared, salt="x")) == 0
    assert placed.place(request("b", shared, salt="y")) == 1
    assert placed.place(request("c", shared, salt="y")) == 1


def test_without_prefix_caching_only_the_load_counts():
    placed, shared = placement(2, prefix_caching=False), prompt(0, 200)
    assert [placed.place(request(i, shared)) for i in range(4)] == [0, 1, 0, 1]


def test_an_answered_prompt_weighs_less_and_an_ended_one_nothing():
    placed = placement(2)
    placed.place(request("long", prompt(0, 200)))
    placed.place(request("short", prompt(5000, 1)))
    assert placed.load == [800 + ANSWER, PAGE + ANSWER]
    placed.answering("long")
    placed.answering("long")
    assert placed.load == [ANSWER, PAGE + ANSWER]
    placed.ended("long")
    placed.ended("long")
    assert placed.load == [0, PAGE + ANSWER] and placed.replica_of("long") is None


def test_as_many_prefixes_are_known_as_there_are_pages():
    placed = placement(2, num_pages=4)
    first = prompt(0, 4)
    placed.place(request("a", first))
    placed.ended("a")
    for i in range(2):  # eight other pages
        placed.place(request(i, prompt(1000 * (i + 1), 4)))
        placed.ended(str(i))
    placed.place(request("busy", prompt(9000, 1)))  # on 0, which is no longer worth waiting for
    assert placed.place(request("again", first)) == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.sampled_from("paa-e"))))
def test_loads_are_those_of_unfinished_requests(steps):
    placed = placement(3)
    for number, (name, tokens, what) in enumerate(steps):
        if what == "e":
            placed.ended(str(name))
        elif what == "a":
            placed.answering(str(name))
        elif placed.replica_of(str(name)) is None:
            replica = placed.place(request(name, list(range(number % 3, tokens))))
            assert placed.replica_of(str(name)) == replica
    open_ids = [str(i) for i in range(6) if placed.replica_of(str(i)) is not None]
    assert sum(placed.load) >= ANSWER * len(open_ids) and min(placed.load) >= 0
    for name in open_ids:
        placed.ended(name)
    assert placed.load == [0, 0, 0]
