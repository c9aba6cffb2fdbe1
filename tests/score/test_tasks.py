"""Each task over the demo model, against the plain forward, row by row."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.score.conftest import ATOL, CONTEXT
from xlinfer.request import SamplingParams
from xlinfer.score.options import TASKS, TaskOptions
from xlinfer.score.pairs import Pair, encode_pairs
from xlinfer.score.rows import BadRow, Row, Scored
from xlinfer.score.scorer import QUEUED, SLICE, WINDOW, make_scorer
from xlinfer.score.tasks.perplexity import windows
from xlinfer.serve.llm import LLM

CODE = "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    return"


def rows(values: list[dict]) -> Iterator[Row]:
    return (Row(number=n, id=f"row-{n}", values=one) for n, one in enumerate(values))


def run(built, values: list[dict], **options) -> list[Scored]:
    """In the order of the rows, each of them once; nothing is left in the engine."""
    found = list(make_scorer(built, TaskOptions(**options))(rows(values)))
    assert sorted(one.row.number for one in found) == list(range(len(values)))
    assert not built.engine.has_work
    return sorted(found, key=lambda one: one.row.number)


def results(built, values: list[dict], **options) -> list:
    return [one.result for one in run(built, values, **options)]


PAIRS = [
    (CODE, " a * b\n"),
    (CODE, " a + b\n"),
    (CODE + " ", "a * b\n"),  # its space is the continuation's first token's
    (CODE[:20], CODE[20:]),
    ("", "import os\n"),
    ("   ", "import os\n"),
    ("<|endoftext|>", "import os\n"),
    ("x", "\n"),
    ("naïve 🎉", " ünïcode"),
]


def test_loglikelihood_equals_the_full_forward(built, scores):
    values = [{"context": a, "continuation": b} for a, b in PAIRS]
    found = results(built, values * 3, task="loglikelihood")
    for (context, continuation), result in zip(PAIRS * 3, found, strict=True):
        encode = lambda text: built.tokenizer.encode(text, add_special_tokens=False)
        kept = encode(context.rstrip()) or [0]
        whole = encode(context + continuation)
        whole = whole if context.strip() else [0, *whole]
        want, greedy = scores(whole, len(kept))
        assert result["num_tokens"] == len(want) > 0
        np.testing.assert_allclose(result["token_logprobs"], want, atol=ATOL)
        assert result["logprob"] == pytest.approx(sum(want), abs=ATOL)
        assert result["is_greedy"] == greedy


def test_a_greedy_continuation_is_greedy(built):
    (answer,) = results(built, [{"prompt": CODE}], task="generate", max_tokens=6)
    values = [
        {"context": CODE, "continuation": answer["text"]},
        {"context": CODE, "continuation": answer["text"] + " zebra"},
    ]
    assert [r["is_greedy"] for r in results(built, values, task="loglikelihood")] == [True, False]


def test_rows_of_one_context_share_its_pages(built):
    built.engine.reset_prefix_cache()
    values = [{"context": CODE * 2, "continuation": f" {n}"} for n in range(12)]
    found = run(built, values, task="loglikelihood")
    longest = max(one.num_tokens for one in found)
    cheap = [one for one in found if one.num_tokens <= longest - 48]
    assert len(cheap) == 11, "the context was computed again"


def test_choices(built, scores):
    listed = [" a * b", " a + b", " banana banana"]
    (found,) = results(
        built, [{"context": CODE, "choices": listed, "label": " a * b"}], task="choices"
    )
    sums = []
    for n, choice in enumerate(listed):
        context, whole = built.tokenizer.encode(CODE), built.tokenizer.encode(CODE + choice)
        want, _ = scores(whole, len(context))
        sums.append(sum(want))
        assert found["num_tokens"][n] == len(want) and found["num_bytes"][n] == len(choice)
    np.testing.assert_allclose(found["logprobs"], sums, atol=ATOL)
    by = {"sum": [1, 1, 1], "bytes": found["num_bytes"], "tokens": found["num_tokens"]}
    for name, sizes in by.items():
        chosen = int(np.argmax(np.array(sums) / sizes))
        assert found["chosen"][name] == chosen
        assert found["acc"][name] == (chosen == 0)


@pytest.mark.parametrize(("max_length", "stride"), [(None, None), (17, None), (32, 8), (9, 1)])
def test_perplexity_equals_windows_of_the_full_forward(built, scores, max_length, stride):
    text = CODE * 9 if max_length != 9 else CODE
    (found,) = results(
        built, [{"text": text}], task="perplexity", max_length=max_length, stride=stride
    )
    tokens = [0, *built.tokenizer.encode(text, add_special_tokens=False)]
    length = max_length or CONTEXT
    told, total = 1, 0.0
    while told < len(tokens):  # by hand: as much context as there is room for
        end = min(len(tokens), length if told == 1 else told + (stride or length - 1))
        first = max(end - length, 0)
        total += sum(scores(tokens[first:end], told - first)[0])
        told = end
    count = len(tokens) - 1
    assert (found["num_tokens"], found["num_bytes"]) == (count, len(text))
    assert found["num_words"] == len(text.split())
    assert found["logprob"] == pytest.approx(total, abs=ATOL * count)
    assert found["token_perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)
    words = found["num_words"]
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-total / len(text)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["byte_perplexity"]), rel=1e-6)


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_windows_tell_of_every_token_once(count, length, data):
    stride = data.draw(st.integers(1, length - 1))
    told = []
    for tokens, start in ((p.tokens, p.start) for p in windows(range(count), length, stride)):
        assert len(tokens) <= length and 1 <= start < len(tokens)
        assert list(tokens) == list(range(tokens[0], tokens[0] + len(tokens)))
        told += tokens[start:]
    assert told == list(range(1, count))


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_embeddings(built, plain, pooling):
    texts = ["import os", CODE * 2, "x"]
    values = [{"text": text} for text in texts]
    whole = results(built, values, task="embed", pooling=pooling)
    raw = results(built, values, task="embed", pooling=pooling, normalize=False, dimensions=7)
    pool = {"last": lambda x: x[-1], "mean": lambda x: x.mean(0), "cls": lambda x: x[0]}[pooling]
    for text, one, cut in zip(texts, whole, raw, strict=True):
        want = pool(plain(built.tokenizer.encode(text))[1])
        np.testing.assert_allclose(one["embedding"], want / np.linalg.norm(want), atol=ATOL)
        np.testing.assert_allclose(cut["embedding"], want[:7], atol=ATOL)


def test_more_dimensions_than_there_are_are_refused(built):
    (found,) = results(built, [{"text": "x"}], task="embed", dimensions=257)
    assert isinstance(found, BadRow) and "from 1 to 256" in str(found)


def test_answers_are_the_librarys(built):
    prompts = [CODE, "import os\n", "class Queue:"]
    sampling = SamplingParams(temperature=0, max_tokens=12, stop="\n\n")
    want = LLM.over(built).generate(prompts, sampling, use_tqdm=False)
    found = results(
        built, [{"prompt": p} for p in prompts], task="generate", max_tokens=12, stop=("\n\n",)
    )
    for one, output in zip(found, want, strict=True):
        answer = output.outputs[0]
        assert (one["text"], one["finish_reason"]) == (answer.text, answer.finish_reason)
        assert one["num_tokens"] == len(answer.token_ids)


def test_a_rows_answer_does_not_hang_on_the_run(built):
    """It is drawn by its id: a shard that is computed twice gives the same rows."""
    scorer = make_scorer(built, TaskOptions(task="generate", max_tokens=8, temperature=1.0))
    listed = list(rows([{"prompt": CODE}] * 6))
    text = lambda found: {one.row.id: one.result["text"] for one in found}  # type: ignore[index]
    first, again = text(scorer(iter(listed))), text(scorer(reversed(listed)))
    assert first == again and len(set(first.values())) > 1


def test_chat_goes_by_the_template(built):
    messages = [{"role": "user", "content": "Add two numbers"}]
    sampling = SamplingParams(temperature=0, max_tokens=8)
    (want,) = LLM.over(built).chat(messages, sampling, use_tqdm=False)
    values = [{"prompt": "Add two numbers"}, {"prompt": messages}]
    for one in results(built, values, task="generate", chat=True, max_tokens=8):
        assert one["text"] == want.outputs[0].text


LONG = " word" * CONTEXT
BAD = {
    "loglikelihood": [
        ({"context": LONG, "continuation": " x"}, f"tokens, and the model's context is {CONTEXT}"),
        ({"context": "a", "continuation": None}, "continuation must be a string, got NoneType"),
        ({"context": "a", "continuation": ""}, "no tokens of its own"),
        ({"context": "a", "continuation": "\ud800"}, "not valid Unicode"),
    ],
    "choices": [
        ({"context": "a", "choices": []}, "choices must be a list of strings"),
        ({"context": "a", "choices": [" x", LONG]}, r"choices\[1\] has 1\d\d tokens"),
        ({"context": "a", "choices": [" x"], "label": 1}, "label must be one of the 1 choices"),
    ],
    "perplexity": [({"text": ""}, "no tokens"), ({"text": 5}, "must be a string, got int")],
    "embed": [({"text": LONG}, f"context is {CONTEXT}"), ({"text": ""}, "no tokens")],
    "generate": [({"prompt": LONG}, f"context is {CONTEXT}"), ({"prompt": ["a"]}, "a string")],
}
GOOD = {
    "loglikelihood": {"context": CODE, "continuation": " a"},
    "choices": {"context": CODE, "choices": [" a", " b"]},
    "perplexity": {"text": CODE},
    "embed": {"text": CODE},
    "generate": {"prompt": CODE},
}


@pytest.mark.parametrize("task", BAD)
def test_a_bad_row_stops_no_other(built, task):
    bad = BAD[task]
    values = [GOOD[task], *(value for value, _ in bad), GOOD[task]]
    first, *found, last = results(built, values, task=task, max_tokens=4)
    assert first == last and not isinstance(first, BadRow)
    for result, (_, says) in zip(found, bad, strict=True):
        with pytest.raises(BadRow, match=says):
            raise result


def test_rows_are_asked_for_as_there_is_room(built):
    asked = 0

    def endless():
        nonlocal asked
        for row in rows([{"context": "a", "continuation": " b"}] * 100_000):
            asked += 1
            yield row

    found = make_scorer(built, TaskOptions(task="loglikelihood"))(endless())
    for done in range(1, 300):
        next(found)
        assert asked <= done + (2 * WINDOW + SLICE + QUEUED + 1) * built.engine.plan.max_num_seqs
    found.close()  # type: ignore[attr-defined]
    while built.engine.has_work:
        built.engine.step()
    assert built.engine.stats().num_running == built.engine.stats().num_waiting == 0


def test_what_a_user_may_not_ask_of_this_model(built):
    for options, says in (
        ({"task": "perplexity", "max_length": CONTEXT + 1}, "more than the model's context"),
        ({"task": "perplexity", "stride": CONTEXT}, "stride must be less"),
    ):
        with pytest.raises(ValueError, match=says):
            make_scorer(built, TaskOptions(**options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "guess"}, "task must be one of generate, loglikelihood"),
        ({"task": "generate", "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"task": "generate", "temperature": -1.0}, "temperature"),
        ({"task": "perplexity", "max_length": 8, "stride": 8}, "less than max_length=8"),
        ({"task": "embed", "pooling": "max"}, "one of last, mean, cls"),
    ],
)
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        TaskOptions(**options)


def test_pairs_are_cut_where_the_context_ends(built):
    (pair,) = encode_pairs(built.tokenizer, [("def f(x):  ", "\n  return")], 0)
    context = built.tokenizer.encode("def f(x):")
    assert isinstance(pair, Pair)
    assert pair.start == len(context) and pair.tokens[: pair.start] == tuple(context)
    assert built.tokenizer.decode(pair.tokens) == "def f(x):  \n  return"


def test_every_task_says_what_it_needs():
    assert all(task.columns and task.about.endswith(".") for task in TASKS.values())
