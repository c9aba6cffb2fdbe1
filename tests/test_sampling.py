"""Each sampling parameter against its definition in numpy, and rows against their neighbours."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from xlinfer import sampling
from xlinfer.engine.sequence import Sequence
from xlinfer.engine.slots import needs, output_counts, recent_tokens, slot_params
from xlinfer.request import Request, SamplingParams
from xlinfer.sampling import BANNED, SlotParams, SlotState, Wanted

VOCABULARIES = (50, 4100)  # neither is a multiple of 32
ATOL = {
    "logits": 1e-5,  # a handful of float32 roundings of values below 30
    "logprobs": 2e-5,  # the same and a sum of 4,100 exponentials
    "mass": 1e-6,  # rows whose cumulative probability comes this near top_p are not compared
}
BATCH = 4
ALL = Wanted(*np.ones(len(Wanted._fields), np.int32))
choose = jax.jit(
    lambda logits_RV, params, state, slot_R, length_R, wanted: sampling.choose(
        logits_RV, sampling.take(params, slot_R), state, slot_R, length_R, wanted
    )
)
take, advance = jax.jit(sampling.take), jax.jit(sampling.advance)


@dataclass(frozen=True)
class Row:
    """A request on its way: what it asks, what it has said, and its next logits."""

    sampling: SamplingParams
    prompt: tuple[int, ...] = (3, 4, 5)
    answer: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    answer_index: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    def sequence(self) -> Sequence:
        request = Request(
            request_id="", prompt_token_ids=self.prompt, sampling=self.sampling,
            eos_token_ids=self.eos, bad_words_token_ids=self.bad_words,
            answer_index=self.answer_index,
        )  # fmt: skip
        most = len(self.prompt) + (self.sampling.max_tokens or 0)
        tokens = [*self.prompt, *self.answer]
        return Sequence(request=request, order=(), max_length=most, tokens=tokens)


def tables(rows: list[Row], vocab_size: int) -> tuple[SlotParams, SlotState, np.ndarray]:
    """The rows in slots in reverse, so that row r is not slot r."""
    seqs = [row.sequence() for row in rows[::-1]]
    stack = lambda *values: np.stack(values)
    params = jax.tree.map(stack, *(slot_params(seq, vocab_size, 0) for seq in seqs))
    state = SlotState(
        token_Z=np.array([seq.tokens[-1] for seq in seqs], np.int32),
        done_Z=np.zeros(len(seqs), bool),
        recent_ZC=stack(*(recent_tokens(seq) for seq in seqs)),
        output_count_ZV=stack(*(output_counts(seq, vocab_size) for seq in seqs)),
    )
    return params, state, np.arange(len(rows), dtype=np.int32)[::-1]


def choices(rows: list[Row], logits_RV, wanted: Wanted | None = None) -> list[int]:
    """Each row's next token. In batches of one size, so that one compile does for all."""
    tokens = []
    for start in range(0, len(rows), BATCH):
        some, logits_rV = rows[start : start + BATCH], logits_RV[start : start + BATCH]
        if (missing := BATCH - len(some)) > 0:
            some = [*some, *[Row(SamplingParams(temperature=0))] * missing]
            logits_rV = np.pad(logits_rV, [(0, missing), (0, 0)])
        params, state, slot_R = tables(some, logits_RV.shape[1])
        length_R = np.array([row.length for row in some], np.int32)
        asked = np.any([needs(row.sampling) for row in some], axis=0).astype(np.int32)
        tokens += choose(
            logits_rV, params, state, slot_R, length_R, wanted or Wanted(*asked)
        ).tolist()
    return tokens[: len(rows)]


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab_size)).astype(np.float32)


def processed(row: Row, logits_V: np.ndarray) -> np.ndarray:
    """The definition: constraints, then penalties as in vLLM. -inf: may not be chosen."""
    x_V, s = logits_V.astype(np.float64), row.sampling
    if s.allowed_token_ids is not None:
        x_V[np.setdiff1d(np.arange(len(x_V)), list(s.allowed_token_ids))] = -np.inf
    for word in row.bad_words:
        before = word[:-1]
        if row.answer[len(row.answer) - len(before) :] == before:
            x_V[word[-1]] = -np.inf
    for token, bias in (s.logit_bias or {}).items():
        x_V[token] += bias
    if len(row.answer) < s.min_tokens:
        x_V[[*row.eos, *(s.stop_token_ids or ())]] = -np.inf
    for token in {*row.prompt, *row.answer}:
        x_V[token] *= s.repetition_penalty if x_V[token] <= 0 else 1 / s.repetition_penalty
    for token in set(row.answer):
        x_V[token] -= s.frequency_penalty * row.answer.count(token) + s.presence_penalty
    return x_V


def kept(row: Row, x_V: np.ndarray) -> set[int] | None:
    """The tokens that may be drawn; None when rounding could decide."""
    s, y_V = row.sampling, x_V.astype(np.float64) / row.sampling.temperature
    p_V = np.exp(y_V - y_V.max())
    keep_V = p_V >= s.min_p
    if s.top_k:
        keep_V &= p_V >= np.sort(np.where(keep_V, p_V, 0))[-min(s.top_k, len(p_V))]
    p_V = np.where(keep_V, p_V, 0) / p_V[keep_V].sum()
    if s.top_p < 1:
        above_V = np.array([p_V[p_V > p].sum() for p in p_V])  # kept while these do not suffice
        if np.abs(above_V[keep_V & (above_V > 0)] - s.top_p).min(initial=1) < ATOL["mass"]:
            return None
        keep_V &= above_V < s.top_p
    return set(np.flatnonzero(keep_V).tolist())


def asks(temperature: float = 0, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=temperature, **fields)


RICH = (
    Row(asks()),
    Row(asks(temperature=0.7, top_p=0.8, seed=1)),
    Row(asks(temperature=1.3, top_k=5, seed=2), answer=(7, 7, 9)),
    Row(asks(temperature=1, min_p=0.1, seed=3, logprobs=2)),
    Row(asks(temperature=2, top_p=0.9, top_k=30, min_p=0.01, seed=4)),
    Row(asks(presence_penalty=1.5, frequency_penalty=-0.5), answer=(1, 1)),
    Row(asks(temperature=1, repetition_penalty=1.8, seed=5), answer=(8, 2, 8)),
    Row(asks(repetition_penalty=0.6, presence_penalty=-2.0), answer=(49,)),
    Row(asks(temperature=1, logit_bias={0: -100.0, 7: 5.5, 49: 2.0}, seed=-6)),
    Row(asks(allowed_token_ids=[0, 31, 32, 49])),
    Row(asks(temperature=1, min_tokens=3, stop_token_ids=[6, 0]), answer=(1, 2), eos=(2,)),
    Row(asks(min_tokens=3, stop_token_ids=[6]), answer=(1, 2, 3), eos=(2,)),
    Row(
        asks(temperature=1, bad_words=["x"]),
        answer=(1, 2, 3), bad_words=((9,), (2, 3, 4), (3, 5), (2, 6)),
    ),
    Row(asks(bad_words=["x"]), (9, 4), (4,), bad_words=((9, 4, 7), (4, 8))),
)  # fmt: skip


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
class TestDefinitions:
    def test_constraints_and_penalties(self, vocab_size):
        logits_RV = random_logits(len(RICH), vocab_size)
        params, state, slot_R = tables(list(RICH), vocab_size)
        own = take(params, slot_R)
        length_R = np.array([row.length for row in RICH], np.int32)
        x_RV = jax.jit(sampling._constrain)(logits_RV, own, state, slot_R, length_R)
        x_RV = np.asarray(jax.jit(sampling._penalize)(x_RV, own, state, slot_R))
        want_RV = np.stack([processed(*both) for both in zip(RICH, logits_RV, strict=True)])
        banned_RV = want_RV == -np.inf
        assert banned_RV.any(1).sum() == 4
        assert (x_RV[banned_RV] < BANNED / 1e5).all()
        np.testing.assert_allclose(
            x_RV[~banned_RV], want_RV[~banned_RV], rtol=0, atol=ATOL["logits"]
        )

    def test_greedy_rows_take_the_largest(self, vocab_size):
        rows = [replace(row, sampling=replace(row.sampling, temperature=0)) for row in RICH]
        for seed in range(5):
            logits_RV = random_logits(len(rows), vocab_size, seed)
            want = [processed(*both).argmax() for both in zip(rows, logits_RV, strict=True)]
            assert choices(rows, logits_RV) == want

    def test_greedy_avoids_what_is_banned(self, vocab_size):
        """Every banned token is made the likeliest in turn."""
        for row in RICH:
            row = replace(row, sampling=replace(row.sampling, temperature=0))
            logits_V = random_logits(1, vocab_size)[0]
            for token in np.flatnonzero(processed(row, logits_V) == -np.inf)[:40]:
                raised_1V = np.where(np.arange(vocab_size) == token, 90, logits_V)[None]
                assert choices([row], raised_1V.astype(np.float32)) != [token]

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
    def test_kept_sets(self, vocab_size, temperature):
        filters = [
            {"top_k": 1}, {"top_k": 7}, {"top_k": vocab_size}, {"top_k": 2**31 - 1},
            {"min_p": 1.0}, {"min_p": 0.2}, {"min_p": 1e-3}, {"min_p": 1e-40},
            {"top_p": 1e-6}, {"top_p": 1e-44}, {"top_p": 0.3}, {"top_p": 0.95}, {"top_p": 0.999},
            {"top_p": 0.7, "top_k": 10}, {"top_p": 0.9, "min_p": 0.05}, {"top_k": 4, "min_p": 0.5},
            {"top_p": 0.5, "top_k": 20, "min_p": 0.01}, {},
        ]  # fmt: skip
        rows = [Row(SamplingParams(temperature=temperature, **some)) for some in filters]
        logits_RV = random_logits(len(rows), vocab_size, seed=int(temperature * 2))
        params, _, slot_R = tables(rows, vocab_size)
        own = take(params, slot_R)
        y_RV = jax.jit(sampling._filter)(logits_RV / temperature, own)
        compared = 0
        for row, x_V, y_V in zip(rows, logits_RV, np.asarray(y_RV), strict=True):
            if (want := kept(row, x_V)) is not None:
                compared += 1
                assert set(np.flatnonzero(y_V > BANNED / 2).tolist()) == want, row.sampling
        assert compared > len(rows) - 2

    def test_equals_of_the_last_one_kept_are_kept(self, vocab_size):
        rows = [Row(SamplingParams(top_k=2)), Row(SamplingParams(top_p=0.5))]
        logits_RV = np.full((2, vocab_size), -20, np.float32)
        logits_RV[:, [3, 33, 40]] = 2.0
        logits_RV[:, 41] = 1.0
        params, _, slot_R = tables(rows, vocab_size)
        y_RV = jax.jit(sampling._filter)(logits_RV, take(params, slot_R))
        assert [np.flatnonzero(y_V > BANNED / 2).tolist() for y_V in y_RV] == [[3, 33, 40]] * 2

    def test_ties_go_to_the_first(self, vocab_size):
        logits_RV = np.zeros((3, vocab_size), np.float32)
        logits_RV[1, [7, 40]] = 1
        logits_RV[2] = -np.inf
        logits_RV[2, [9, 10]] = -3
        assert choices([Row(SamplingParams(temperature=0))] * 3, logits_RV) == [0, 7, 9]

    def test_a_row_with_everything_banned_gives_a_token(self, vocab_size):
        """And one of the vocabulary: a request can ask for such a thing."""
        for temperature in (0, 1, 1e4):
            s = SamplingParams(
                temperature=temperature, top_k=3, top_p=0.5, min_p=0.1, allowed_token_ids=[6],
                min_tokens=2, stop_token_ids=[6], repetition_penalty=1e4,
            )  # fmt: skip
            [token] = choices([Row(s)], random_logits(1, vocab_size))
            assert 0 <= token < vocab_size


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("row", RICH, ids=range(len(RICH)))
def test_neighbours_change_nothing(row, vocab_size):
    """At any place, beside any rows, with any parts of the sampler switched on."""
    logits_NV = random_logits(8, vocab_size, seed=1)
    plain = [Row(SamplingParams(temperature=0))] * 3
    for mine_V, answer in zip(logits_NV, (row.answer, (1, 2, 3, 4, 5), ()) * 3, strict=False):
        mine = replace(row, answer=answer)
        alone = choices([mine, *plain], np.stack([mine_V] * 4))[0]
        for place in range(4):
            others = [r for r in RICH if r is not row][place * 3 : place * 3 + 3]
            rows = [*others[:place], mine, *others[place:]]
            logits_RV = random_logits(4, vocab_size, seed=place)
            logits_RV[place] = mine_V
            assert choices(rows, logits_RV)[place] == alone
            assert choices(rows, logits_RV, ALL)[place] == alone


class TestDraws:
    V, N = 50, 8192

    def draws(self, s: SamplingParams, logits_V: np.ndarray, **fields) -> np.ndarray:
        """One draw at each of N positions."""
        params, state, slot_R = tables([Row(s, **fields)], self.V)
        logits_NV = np.broadcast_to(logits_V, (self.N, self.V))
        position_N = np.arange(self.N, dtype=np.int32)
        wanted = Wanted(*needs(s).astype(np.int32))
        slot_N = np.repeat(slot_R, self.N)
        return np.asarray(choose(logits_NV, params, state, slot_N, position_N, wanted))

    def chi_square(self, tokens: np.ndarray, p_V: np.ndarray) -> float:
        counts_V, want_V = np.bincount(tokens, minlength=self.V), self.N * p_V
        rare = want_V < 5
        counts = [*counts_V[~rare], counts_V[rare].sum()]
        want = np.array([*want_V[~rare], want_V[rare].sum() + 1e-9])
        return float(((counts - want) ** 2 / np.maximum(want, 1)).sum())

    def softmax(self, x_V: np.ndarray) -> np.ndarray:
        p_V = np.exp(x_V - x_V.max())
        return p_V / p_V.sum()

    # 49 degrees of freedom: 49 is expected, a fair sample passes 100 once in 50,000 times.
    FAIR, WRONG = 100, 200

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_frequencies_are_the_softmax(self, temperature):
        logits_V = random_logits(1, self.V)[0] / 2
        tokens = self.draws(SamplingParams(temperature=temperature, seed=9), logits_V)
        chi_square = partial(self.chi_square, tokens)
        assert chi_square(self.softmax(logits_V / temperature)) < self.FAIR
        assert chi_square(self.softmax(logits_V / temperature * 1.2)) > self.WRONG
        # Neighbouring positions are independent of each other.
        repeats = (tokens[1:] == tokens[:-1]).mean()
        assert repeats == pytest.approx((self.softmax(logits_V / temperature) ** 2).sum(), abs=0.02)

    def test_filtered_frequencies_are_renormalised(self):
        logits_V = random_logits(1, self.V)[0] / 2
        s = SamplingParams(temperature=1.5, top_k=10, seed=1)
        tokens = self.draws(s, logits_V)
        inside = kept(Row(s), logits_V)
        assert inside is not None and set(tokens.tolist()) == inside
        x_V = np.full(self.V, -np.inf)
        x_V[list(inside)] = logits_V[list(inside)] / 1.5
        assert self.chi_square(tokens, self.softmax(x_V)) < self.FAIR

    def test_seed_and_position_fix_the_token(self):
        logits_V = np.zeros(self.V, np.float32)
        draws = partial(self.draws, logits_V=logits_V)
        one = draws(SamplingParams(seed=1))
        np.testing.assert_array_equal(one, draws(SamplingParams(seed=1), prompt=(9,)))
        others = [
            draws(SamplingParams(seed=2)), draws(SamplingParams(seed=-1)),
            draws(SamplingParams(seed=1 + 2**32)), draws(SamplingParams(seed=1), answer_index=1),
            draws(SamplingParams(seed=1), answer_index=2), np.roll(one, 1),
        ]  # fmt: skip
        for i, some in enumerate(others):
            for other in [one, *others[:i]]:
                assert (some == other).mean() < 2.5 / self.V  # chance: 1/V

    @pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-40])
    def test_a_vanishing_temperature_is_greedy(self, temperature):
        logits_V = random_logits(1, self.V)[0] * 10
        tokens = self.draws(SamplingParams(temperature=temperature), logits_V)
        assert (tokens == logits_V.argmax()).all()


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_logprobs(vocab_size):
    logits_RV = random_logits(4, vocab_size)
    logits_RV[3, [5, 9]] = logits_RV[3].max() + 1  # a tie: the first comes first
    token_R = np.array([0, logits_RV[1].argmax(), vocab_size - 1, 9], np.int32)
    out = jax.jit(sampling.logprobs_of, static_argnums=2)(logits_RV, token_R, 20)
    x_RV = logits_RV.astype(np.float64)
    want_RV = x_RV - np.log(np.exp(x_RV).sum(-1, keepdims=True))
    close = partial(np.testing.assert_allclose, rtol=0, atol=ATOL["logprobs"])
    close(out.chosen_R, want_RV[np.arange(4), token_R])
    order_RV = np.argsort(-logits_RV, axis=-1, kind="stable")
    np.testing.assert_array_equal(out.top_token_RQ, order_RV[:, :20])
    close(out.top_RQ, np.take_along_axis(want_RV, order_RV[:, :20], 1))
    ranks = [1 + int((row > row[t]).sum()) for row, t in zip(logits_RV, token_R, strict=True)]
    assert out.rank_R.tolist() == ranks
    assert (ranks[1], ranks[3]) == (1, 1)
    none = sampling.no_logprobs(4, 20, vocab_size)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(none) == shapes(out)


class TestAdvance:
    ROWS = (
        Row(SamplingParams(max_tokens=9, stop_token_ids=[6]), eos=(2,)),
        Row(SamplingParams(max_tokens=9, stop_token_ids=[6]), eos=(2,)),
        Row(SamplingParams(max_tokens=9, ignore_eos=True), eos=(2,)),
        Row(SamplingParams(max_tokens=3), answer=(7, 2)),
        Row(SamplingParams(max_tokens=9), answer=(7, 2)),
        Row(SamplingParams(max_tokens=9, stop_token_ids=[6]), answer=(7, 2)),
    )

    def run(self, tokens, live):
        params, state, slot_R = tables(list(self.ROWS), 50)
        state = state._replace(done_Z=~np.array(live)[::-1])
        length_R = np.array([row.length for row in self.ROWS], np.int32)
        own = take(params, slot_R)
        new = advance(state, own, slot_R, np.array(tokens, np.int32), length_R, np.array(live))
        by_row = lambda s: jax.tree.map(lambda x: np.asarray(x)[::-1], s)
        return by_row(state), by_row(new)

    def test_who_is_done(self):
        """By eos, by its own stop id, not by eos that it ignores, by its length, not at all."""
        _, new = self.run((2, 6, 2, 8, 8, 8), live=[True] * 5 + [False])
        assert new.done_Z.tolist() == [True, True, False, True, False, True]

    def test_live_rows_are_recorded_and_dead_ones_left(self):
        live = [True, False, True, True, True, False]
        old, new = self.run((1, 6, 1, 8, 7, 9), live)
        assert new.token_Z.tolist() == [1, 5, 1, 8, 7, 2]
        said = np.array([(1,), (), (1,), (7, 2, 8), (7, 2, 7), (7, 2)], dtype=object)
        for r, answer in enumerate(said):
            assert [t for t in new.recent_ZC[r] if t != sampling.NO_TOKEN] == list(answer)
            assert {t: int(n) for t, n in enumerate(new.output_count_ZV[r]) if n} == {
                t: answer.count(t) for t in answer
            }
        assert (new.recent_ZC[1] == old.recent_ZC[1]).all()

    def test_stepwise_equals_fresh(self):
        """A row's tables after some tokens are those of a sequence admitted with them."""
        row = Row(SamplingParams(max_tokens=30))
        params, state, slot_R = tables([row], 50)
        for i, token in enumerate(range(20)):
            state = advance(
                state, params, slot_R, np.array([token % 7], np.int32),
                np.array([row.length + i], np.int32), np.array([True]),
            )  # fmt: skip
        _, fresh, _ = tables([replace(row, answer=tuple(t % 7 for t in range(20)))], 50)
        jax.tree.map(np.testing.assert_array_equal, state, fresh)


def test_empty_slots_are_done_and_ask_for_nothing():
    params, state = sampling.empty_slots(BATCH, 50)
    assert state.done_Z.all()
    slot_R = np.arange(BATCH, dtype=np.int32)
    logits_RV = random_logits(BATCH, 50)
    tokens = choose(logits_RV, params, state, slot_R, slot_R, ALL)
    assert tokens.tolist() == logits_RV.argmax(-1).tolist()
