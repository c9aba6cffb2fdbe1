"""Every field of SamplingParams at its bounds, beyond them and of a wrong type."""

from dataclasses import FrozenInstanceError, fields
from math import inf, nan
from typing import Any

import pytest

from xlinfer.request import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SEED_MAX,
    SEED_MIN,
    InvalidRequest,
    SamplingParams,
)

MOST = 2**31 - 1
NOT_NUMBERS = (None, True, "1", [1], nan, inf, -inf, 10**400)
NOT_INTEGERS = (*NOT_NUMBERS, 1.0, 1.5)
NOT_COUNTS = tuple(x for x in NOT_INTEGERS if x is not None)
NOT_BOOLEANS = (None, 0, 1, "yes", [])
NOT_LISTS = (0, 5, False, 1.5, b"ab", {"a": 1})

ACCEPTED: dict[str, tuple] = {
    "n": (1, MAX_N),
    "temperature": (0, 0.0, 1, 0.7, 1e4),
    "top_p": (1, 1.0, 0.5, 1e-40),
    "top_k": (-1, 0, 1, MOST),
    "min_p": (0, 1, 0.05),
    "presence_penalty": (-2, 2, 0.5),
    "frequency_penalty": (-2, 2, 0.5),
    "repetition_penalty": (1e-4, 1, 1.1, 1e4),
    "seed": (None, 0, SEED_MIN, SEED_MAX),
    "stop": (None, "a", ["a"], ("a", "b"), [], ["x" * MAX_STOP_LENGTH] * MAX_STOP_STRINGS),
    "stop_token_ids": (None, [], [0], (MOST,), [1] * MAX_STOP_TOKEN_IDS),
    "bad_words": (None, [], ["a b"], ["x" * MAX_STOP_LENGTH] * MAX_BAD_WORDS),
    "include_stop_str_in_output": (True, False),
    "ignore_eos": (True, False),
    "max_tokens": (None, 1, MOST),
    "min_tokens": (0, 1, 16),
    "logprobs": (None, -1, 0, 20, MOST),
    "prompt_logprobs": (None, -1, 0, 20, MOST),
    "logit_bias": (None, {}, {0: -100, MOST: 100.0}, {"7": 1}, dict.fromkeys(range(1024), 1.0)),
    "allowed_token_ids": (None, [0], (MOST,), range(100_000)),
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
    "detokenize": (True, False),
}

REFUSED: dict[str, tuple] = {
    "n": (0, -1, MAX_N + 1, *NOT_INTEGERS),
    "temperature": (-0.1, -1e-9, 1e4 + 1, *NOT_NUMBERS),
    "top_p": (0, 0.0, -0.1, 1.01, *NOT_NUMBERS),
    "top_k": (-2, MOST + 1, -1.0, *NOT_INTEGERS),
    "min_p": (-0.1, 1.01, *NOT_NUMBERS),
    "presence_penalty": (-2.01, 2.01, *NOT_NUMBERS),
    "frequency_penalty": (-2.01, 2.01, *NOT_NUMBERS),
    "repetition_penalty": (0, 0.0, -1, 1e-5, 1e4 + 1, *NOT_NUMBERS),
    "seed": (SEED_MIN - 1, SEED_MAX + 1, *NOT_COUNTS),
    "stop": ("", [""], ["a", 1], [None], ["x" * (MAX_STOP_LENGTH + 1)],
             ["a"] * (MAX_STOP_STRINGS + 1), ["a"] * 10_000, *NOT_LISTS),
    "stop_token_ids": ([-1], [MOST + 1], [True], [1.5], ["a"], [None], "12",
                       [1] * (MAX_STOP_TOKEN_IDS + 1), *NOT_LISTS),
    "bad_words": ("word", [""], [1], ["x" * (MAX_STOP_LENGTH + 1)],
                  ["a"] * (MAX_BAD_WORDS + 1), *NOT_LISTS),
    "include_stop_str_in_output": NOT_BOOLEANS,
    "ignore_eos": NOT_BOOLEANS,
    "max_tokens": (0, -1, MOST + 1, *NOT_COUNTS),
    "min_tokens": (-1, 17, *NOT_INTEGERS),
    "logprobs": (-2, MOST + 1, *NOT_COUNTS),
    "prompt_logprobs": (-2, MOST + 1, *NOT_COUNTS),
    "logit_bias": (5, [1], "12", {-1: 1}, {MOST + 1: 1}, {"a": 1}, {"1.5": 1}, {"": 1},
                   {1.5: 1}, {True: 1}, {None: 1}, {1: 101}, {1: -101}, {1: nan}, {1: "a"},
                   {1: None}, {1: True}, {"9" * 5000: 1}, {"-1": 1},
                   dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
    "allowed_token_ids": ([], [-1], [MOST + 1], [True], ["a"], "12", *NOT_LISTS),
    "skip_special_tokens": NOT_BOOLEANS,
    "spaces_between_special_tokens": NOT_BOOLEANS,
    "detokenize": NOT_BOOLEANS,
}  # fmt: skip


def build(**values: Any) -> SamplingParams:
    return SamplingParams(**values)


def cases(table: dict[str, tuple]):
    return [
        pytest.param(name, value, id=f"{name}-{i}")
        for name, values in table.items()
        for i, value in enumerate(values)
    ]


def test_every_field_is_in_the_tables():
    names = [field.name for field in fields(SamplingParams)]
    assert sorted(ACCEPTED) == sorted(REFUSED) == sorted(names)


@pytest.mark.parametrize(("name", "value"), cases(ACCEPTED))
def test_accepted(name, value):
    assert build(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_refused(name, value):
    with pytest.raises(InvalidRequest) as error:
        build(**{name: value})
    assert error.value.param == name
    assert name in str(error.value)


def test_the_defaults_are_vllms():
    s = SamplingParams()
    assert (s.n, s.temperature, s.top_p, s.top_k, s.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (s.max_tokens, s.min_tokens, s.seed, s.logprobs) == (16, 0, None, None)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (s.ignore_eos, s.detokenize, s.skip_special_tokens) == (False, True, True)


def test_one_form_of_each_value():
    s = build(stop="ab", stop_token_ids=[1], bad_words=["c"], allowed_token_ids=[2, 3], top_k=-1)
    assert (s.stop, s.stop_strings, s.stop_token_ids) == (("ab",), ("ab",), (1,))
    assert (s.bad_words, s.allowed_token_ids, s.top_k) == (("c",), (2, 3), 0)
    assert build(logit_bias={"5": 1, 6: -2}).logit_bias == {5: 1.0, 6: -2.0}
    s = SamplingParams()
    assert (s.stop, s.stop_strings, s.stop_token_ids, s.bad_words) == ((), (), (), ())


def test_what_was_checked_cannot_change():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().top_p = 7  # type: ignore[misc]
    words = ["a"]
    s = build(stop=words)
    words.append("b")
    assert s.stop_strings == ("a",)


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0, True), (1e-6, True), (1e-5, False), (1, False)]
)
def test_greedy(temperature, greedy):
    """As in vLLM, a temperature too small to divide by is none."""
    s = build(temperature=temperature)
    assert s.greedy == greedy == (s.temperature == 0)


def test_a_prompt_alone_can_be_scored():
    assert build(max_tokens=0, prompt_logprobs=0).max_tokens == 0
    with pytest.raises(InvalidRequest, match="max_tokens must be an integer from 1 "):
        build(max_tokens=0)


def test_min_tokens_within_max_tokens():
    assert build(min_tokens=5, max_tokens=5)
    assert build(min_tokens=500, max_tokens=None)
    with pytest.raises(InvalidRequest, match="at most max_tokens=4, got 5") as error:
        build(min_tokens=5, max_tokens=4)
    assert error.value.param == "min_tokens"


def test_stop_strings_need_text():
    assert build(detokenize=False, stop_token_ids=[5])
    with pytest.raises(InvalidRequest, match="detokenize=True") as error:
        build(detokenize=False, stop="a")
    assert error.value.param == "stop"
