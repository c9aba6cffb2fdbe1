"""Buckets, and refusals whose advice is true."""

import re

import pytest

from xlinfer.plan import Plan, PlanError, make_plan, pages_for

SIZES = {
    "max_model_len": 100, "max_num_seqs": 10, "max_num_batched_tokens": 100, "page_size": 8,
    "num_pages": 50, "decode_window": 8, "max_logprobs": 20, "deterministic": False,
}  # fmt: skip


def plan(**changes) -> Plan:
    return make_plan(**(SIZES | changes))


def test_buckets_double_and_end_at_the_most():
    p = plan()
    assert p.token_buckets == (32, 50, 100)
    assert p.decode_buckets == (1, 2, 5, 10)
    p = plan(max_num_seqs=1, max_num_batched_tokens=5)
    assert (p.token_buckets, p.decode_buckets) == ((5,), (1,))
    p = plan(max_num_seqs=16, max_num_batched_tokens=1024)
    assert p.token_buckets == (32, 64, 128, 256, 512, 1024)
    assert p.decode_buckets == (1, 2, 4, 8, 16)


def test_a_larger_ratio_leaves_fewer_programs():
    p = plan(max_num_seqs=32, max_num_batched_tokens=512, bucket_ratio=4)
    assert p.token_buckets == (32, 128, 512)
    assert p.decode_buckets == (1, 8, 32)


def test_the_smallest_bucket_that_holds_it():
    p = plan(max_num_batched_tokens=300)
    assert p.token_buckets == (32, 37, 75, 150, 300)
    sizes = [p.token_bucket(n) for n in (1, 32, 33, 75, 76, 300)]
    assert sizes == [32, 32, 37, 75, 150, 300]
    assert [p.decode_bucket(n) for n in range(1, 11)] == [1, 2, 5, 5, 5, 10, 10, 10, 10, 10]


@pytest.mark.parametrize("seqs", [1, 3, 64, 100])
@pytest.mark.parametrize("tokens", [100, 512, 1000])
def test_at_most_half_of_a_step_is_padding(seqs, tokens):
    p = plan(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    assert all(p.token_bucket(n) < 2 * n for n in range(17, tokens + 1))
    assert all(p.decode_bucket(n) < 2 * n for n in range(1, seqs + 1))


def test_deterministic_has_one_program_of_each_kind():
    p = plan(deterministic=True)
    assert (p.token_buckets, p.decode_buckets) == ((100,), ())
    assert p.decode_window == 0


def test_pages():
    assert [pages_for(n, 8) for n in (0, 1, 8, 9, 16)] == [0, 1, 1, 2, 2]
    assert plan().pages_per_seq == 13
    assert plan(num_pages=14).num_pages == 14  # one sequence and the padding page


@pytest.mark.parametrize(
    ("name", "bad", "least"),
    [
        ("max_model_len", 0, 1), ("max_model_len", -5, 1), ("max_num_seqs", 0, 1),
        ("max_num_batched_tokens", 0, 1), ("page_size", 0, 1), ("page_size", -1, 1),
        ("decode_window", -1, 0), ("max_logprobs", -1, 0),
    ],
)  # fmt: skip
def test_sizes_that_are_none(name, bad, least):
    with pytest.raises(PlanError) as error:
        plan(**{name: bad})
    assert str(error.value) == f"{name} must be at least {least}, got {bad}."
    others = {"max_num_seqs": 1, "num_pages": 101}  # do not stand in the way
    assert getattr(plan(**(others | {name: least})), name) == least


def test_more_rows_than_tokens():
    with pytest.raises(PlanError) as error:
        plan(max_num_seqs=101)
    assert "max_num_batched_tokens=100" in str(error.value)
    assert "max_num_seqs=101" in str(error.value)
    assert plan(max_num_seqs=100).max_num_seqs == 100
    assert plan(max_num_seqs=101, max_num_batched_tokens=101).max_num_seqs == 101


@pytest.mark.parametrize("num_pages", [-3, 0, 1, 2, 7, 13])
@pytest.mark.parametrize("max_model_len", [97, 100, 104])
def test_advice_on_too_few_pages_is_true(num_pages, max_model_len):
    """Either half of it makes the plan; a token more or a page less does not."""
    with pytest.raises(PlanError) as error:
        plan(num_pages=num_pages, max_model_len=max_model_len)
    message = str(error.value)
    assert f"num_pages={num_pages} " in message and f"max_model_len={max_model_len}:" in message
    raised = int(re.findall(r"to (\d+) pages", message)[0])
    assert plan(num_pages=raised, max_model_len=max_model_len)
    with pytest.raises(PlanError):
        plan(num_pages=raised - 1, max_model_len=max_model_len)
    lowered = [int(n) for n in re.findall(r"max_model_len to (\d+)\.", message)]
    assert len(lowered) == (num_pages > 1)  # a page or less holds no sequence at all
    for most in lowered:
        assert plan(num_pages=num_pages, max_model_len=most)
        with pytest.raises(PlanError):
            plan(num_pages=num_pages, max_model_len=most + 1)
