"""What a request puts into the device's tables, and what only the model's sizes can refuse."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from tests.engine.simulation import small_plan
from xlinfer import sampling
from xlinfer.engine.sequence import Sequence
from xlinfer.engine.slots import (
    check_request,
    needs,
    output_counts,
    recent_tokens,
    slot_params,
    stop_ids,
)
from xlinfer.request import MAX_STOP_TOKEN_IDS, InvalidRequest, Request, SamplingParams
from xlinfer.sampling import BAD_WORD_LENGTH, BAD_WORDS, NO_TOKEN, STOP_IDS, Wanted

V, LONGEST, MOST_LOGPROBS = 100, 20, 5
PLAN = small_plan(max_model_len=LONGEST, max_logprobs=MOST_LOGPROBS)
READING = small_plan(max_model_len=LONGEST, max_logprobs=MOST_LOGPROBS, encodes=True)


def request(prompt=(1, 2, 3), *, eos=(), bad_words=(), answer_index=0, **asked: Any) -> Request:
    return Request(
        request_id="r", prompt_token_ids=tuple(prompt), sampling=SamplingParams(**asked),
        eos_token_ids=eos, bad_words_token_ids=bad_words, answer_index=answer_index,
    )  # fmt: skip


def sequence(request: Request, answer=(), max_length=10) -> Sequence:
    tokens = [*request.prompt_token_ids, *answer]
    return Sequence(request=request, order=(), max_length=max_length, tokens=tokens)


def params(request: Request, vocab_size=V, seed=0, **fields):
    return slot_params(sequence(request, **fields), vocab_size, seed)


def tokens_of(bits: np.ndarray) -> list[int]:
    return [32 * w + b for w, word in enumerate(bits.tolist()) for b in range(32) if word >> b & 1]


class TestCheckRequest:
    def check(self, request: Request) -> None:
        check_request(request, V, PLAN)

    @pytest.mark.parametrize(
        "good",
        [
            request(),
            request([0, V - 1] * 9 + [5]),  # one token may follow
            request([5] * LONGEST, max_tokens=0, prompt_logprobs=0),
            request(logprobs=MOST_LOGPROBS, prompt_logprobs=MOST_LOGPROBS),
            request(logit_bias={0: 1.0, V - 1: 1.0}, allowed_token_ids=range(V)),
            request(stop_token_ids=range(MAX_STOP_TOKEN_IDS), eos=range(80, 96)),
            request(stop_token_ids=range(MAX_STOP_TOKEN_IDS), eos=range(MAX_STOP_TOKEN_IDS)),
            request(ignore_eos=True, eos=range(V - 1)),
            request(bad_words=((5,) * BAD_WORD_LENGTH,) * BAD_WORDS),
            request([np.int32(5), np.int64(7)]),
            request(max_tokens=None),
            request(max_tokens=1000),  # ends with the context, as in vLLM
        ],
        ids=range(12),
    )
    def test_accepted(self, good):
        self.check(good)
        table = params(good)
        empty = sampling.empty_slots(1, V).params
        shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert shapes(jax.tree.map(lambda x: x[0], empty)) == shapes(table)

    @pytest.mark.parametrize(
        ("param", "bad", "said"),
        [
            ("prompt", request([]), "at least one token"),
            ("prompt", request([5] * LONGEST), "maximum context length is 20 tokens. However, "
             "your prompt contains 20 input tokens"),
            ("prompt", request([5] * 21, max_tokens=0, prompt_logprobs=0), "contains 21 input"),
            ("prompt", request([1, V]), "token id 100,"),
            ("prompt", request([-1]), "token id -1,"),
            ("prompt", request([1.5]), "token id 1.5,"),
            ("prompt", request(["a"]), "token id 'a',"),
            ("logit_bias", request(logit_bias={V: 1.0}), "token id 100,"),
            ("stop_token_ids", request(stop_token_ids=[1, V]), "vocabulary of 100 tokens"),
            ("allowed_token_ids", request(allowed_token_ids=[1, 2**31 - 1]), "2147483647"),
            ("bad_words", request(bad_words=((1,), (2, V))), "token id 100,"),
            ("logprobs", request(logprobs=6), "at most 5 tokens here, got 6"),
            ("logprobs", request(logprobs=-1), "at most 5 tokens here, got -1"),
            ("prompt_logprobs", request(prompt_logprobs=6), "at most 5 tokens here, got 6"),
            ("bad_words", request(bad_words=((1,), ())), "1 to 16 tokens"),
            ("bad_words", request(bad_words=((1,) * 17,)), "1 to 16 tokens"),
            ("bad_words", request(bad_words=((1,),) * (BAD_WORDS + 1)), f"At most {BAD_WORDS}"),
            ("stop_token_ids", request(stop_token_ids=range(MAX_STOP_TOKEN_IDS), eos=range(70, 87)),
             f"At most {STOP_IDS} tokens"),
        ],
    )  # fmt: skip
    def test_refused(self, param, bad, said):
        with pytest.raises(InvalidRequest) as error:
            self.check(bad)
        assert error.value.param == param
        assert said in str(error.value)

    def test_all_logprobs_where_the_vocabulary_is_small(self):
        check_request(request(logprobs=-1), V, replace(PLAN, max_logprobs=V))


class TestEncoders:
    def reading(self, count: int, **asked: Any) -> Request:
        return replace(request(prompt=(0,), **asked), encoder_token_ids=tuple(range(count)))

    def test_the_encoders_input_is_as_long_as_a_sequence_at_most(self):
        check_request(self.reading(LONGEST), V, READING)
        with pytest.raises(InvalidRequest, match=r"encoder reads at most 20 tokens.* contains 21"):
            check_request(self.reading(LONGEST + 1), V, READING)

    @pytest.mark.parametrize(
        "bad, plan, param",
        [
            (request(), READING, "prompt"),
            (replace(request(), encoder_token_ids=(1,)), PLAN, "encoder_token_ids"),
            (replace(request(), encoder_token_ids=(V,)), READING, "prompt"),
            (
                replace(request(prompt_logprobs=0), encoder_token_ids=(1,)),
                READING,
                "prompt_logprobs",
            ),
        ],
    )
    def test_refused(self, bad, plan, param):
        with pytest.raises(InvalidRequest) as error:
            check_request(bad, V, plan)
        assert error.value.param == param


def test_stop_ids():
    both = {"stop_token_ids": [7, 2, 7], "eos": (2, 9)}
    assert stop_ids(request(**both)) == (2, 9, 7)
    assert stop_ids(request(**both, ignore_eos=True)) == (7, 2)
    assert stop_ids(request()) == ()


PARTS: dict[str, list[dict]] = {
    "random": [{"temperature": 0.5}],
    "filters": [{"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1}],
    "penalties": [{"presence_penalty": -1}, {"frequency_penalty": 1},
                  {"repetition_penalty": 0.9}],
    "constraints": [{"logit_bias": {1: 1.0}}, {"bad_words": ["a"]}, {"min_tokens": 1},
                    {"allowed_token_ids": [1]}],
    "logprobs": [{"logprobs": 0}, {"logprobs": 3}],
}  # fmt: skip


class TestNeeds:
    @pytest.mark.parametrize("part", PARTS)
    def test_each_parameter_switches_its_part_on(self, part):
        for asked in PARTS[part]:
            values: dict[str, Any] = {"temperature": 0} | asked
            wanted = Wanted(*needs(SamplingParams(**values)).tolist())
            assert wanted == Wanted(*(name == part for name in Wanted._fields)), asked

    def test_nothing_by_default(self):
        silent = SamplingParams(
            temperature=0, stop="a", stop_token_ids=[5], logit_bias={}, bad_words=[], seed=3,
            prompt_logprobs=2,
        )  # fmt: skip
        assert not needs(silent).any()


class TestTables:
    def test_plain_values(self):
        row = params(
            request(
                temperature=0.5, top_p=0.25, min_p=0.125, presence_penalty=1, min_tokens=4,
                frequency_penalty=-1, repetition_penalty=2, top_k=7, max_tokens=5,
            ),
            max_length=8,
        )  # fmt: skip
        assert (row.temperature_Z, row.top_p_Z, row.min_p_Z, row.top_k_Z) == (0.5, 0.25, 0.125, 7)
        assert (row.presence_Z, row.frequency_Z, row.repetition_Z) == (1, -1, 2)
        assert (row.min_length_Z, row.max_length_Z) == (3 + 4, 8)

    @pytest.mark.parametrize("top_k", [-1, 0, V, V + 1, 2**31 - 1])
    def test_top_k_of_all(self, top_k):
        assert params(request(top_k=top_k)).top_k_Z == V

    def test_lists_are_padded_with_what_means_nothing(self):
        row = params(
            request(stop_token_ids=[7], eos=(2,), bad_words=((5,), (6, 8)), logit_bias={9: 1.5})
        )
        assert [t for t in row.stop_ZE if t != NO_TOKEN] == [2, 7]
        words = [[t for t in word if t != NO_TOKEN] for word in row.bad_words_ZBC.tolist()]
        assert words == [[5], [6, 8]] + [[]] * (BAD_WORDS - 2)
        assert row.bad_words_ZBC[1, -2:].tolist() == [6, 8], "at the end"
        assert row.bias_token_ZA[0] == 9
        assert row.bias_ZA[0] == row.bias_ZA.sum() == 1.5

    @pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 100])
    def test_bits(self, vocab_size):
        row = params(request(prompt=[0, vocab_size - 1]), vocab_size)
        assert tokens_of(row.allowed_Zv) == list(range(vocab_size))
        assert tokens_of(row.prompt_Zv) == sorted({0, vocab_size - 1})
        row = params(request(prompt=[0], allowed_token_ids=[vocab_size - 1]), vocab_size)
        assert tokens_of(row.allowed_Zv) == [vocab_size - 1]
        assert len(row.allowed_Zv) == -(-vocab_size // 32)

    def test_seeds(self):
        """Every seed and answer has its own key; the given one is used by who names none."""
        key = lambda seed=None, index=0, given=0: tuple(
            params(request(seed=seed, answer_index=index), seed=given).seed_Z2.tolist()
        )
        assert key(5) == key(5, given=9) == key(given=5)
        seeds = [0, 1, -1, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)]
        keys = [key(seed, index) for seed in seeds for index in (0, 1, 2)]
        assert len(set(keys)) == len(keys)


def test_recent_tokens_are_of_the_answer():
    r = request(prompt=[1, 2, 3])
    assert [t for t in recent_tokens(sequence(r)) if t != NO_TOKEN] == []
    assert recent_tokens(sequence(r, [7, 8])).tolist() == [NO_TOKEN] * 14 + [7, 8]
    assert recent_tokens(sequence(r, range(30))).tolist() == list(range(14, 30))


def test_output_counts_are_of_the_answer():
    r = request(prompt=[1, 2, 3])
    assert output_counts(sequence(r), V).tolist() == [0] * V
    counts = output_counts(sequence(r, [7, 1, 7, 99]), V)
    assert {t: n for t, n in enumerate(counts.tolist()) if n} == {1: 1, 7: 2, 99: 1}
    assert counts.dtype == np.int32
