"""The library on the real engine: what code written for vLLM's LLM gets from it."""

import math

import numpy as np
import pytest

import xlinfer
from tests.end_to_end.conftest import MAX_MODEL_LEN
from xlinfer import LLM, InvalidRequest, PlanError, SamplingParams
from xlinfer.request import MAX_STOP_STRINGS
from xlinfer.serve.build import DEMO_MODEL

# The engine's programs and the plain forward add in different orders, in float32.
LOGPROB_ATOL = 1e-4
FIBONACCI = "def fibonacci(n):\n"
CHAT = [{"role": "user", "content": "Write a function that adds two numbers"}]


@pytest.fixture(scope="module")
def llm(built) -> LLM:
    return LLM.over(built)


@pytest.fixture(scope="module")
def deterministic() -> LLM:
    """Built as a user builds one. It has one program of each kind, so it is ready soon."""
    return LLM(
        DEMO_MODEL, deterministic=True, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=96
    )


def greedy(max_tokens: int, **fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def answers(outputs) -> list[list[tuple]]:
    """What a repeated run must give again, to the bit."""
    return [
        [(a.token_ids, a.text, a.logprobs, a.finish_reason) for a in o.outputs] for o in outputs
    ]


def test_generate_continues_as_the_plain_forward_does(llm, tokenizer, reference):
    ids = tokenizer.encode(FIBONACCI)
    (output,) = llm.generate(FIBONACCI, greedy(16))
    (answer,) = output.outputs
    assert (output.prompt, output.prompt_token_ids, output.finished) == (FIBONACCI, ids, True)
    assert reference([*ids, *answer.token_ids])[len(ids) - 1 : -1].argmax(-1).tolist() == (
        answer.token_ids
    )
    assert answer.text == tokenizer.decode(answer.token_ids) and answer.finish_reason == "length"
    assert answer.logprobs is None and output.prompt_logprobs is None


def test_results_stand_in_the_order_of_prompts(llm, tokenizer, heldout):
    texts = [heldout[at * 500 : at * 500 + 12 + 9 * at] for at in range(24)]
    ids = [tokenizer.encode(text) for text in texts]
    forms = (
        lambda n: texts[n],
        lambda n: {"prompt": texts[n]},
        lambda n: {"prompt_token_ids": ids[n]},
    )
    prompts = [forms[n % 3](n) for n in range(24)]
    params = [greedy(30 - n) for n in range(24)]  # the last ends first
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in together] == ids
    assert [output.prompt is None for output in together] == [n % 3 == 2 for n in range(24)]
    alone = [llm.generate(text, one)[0] for text, one in zip(texts, params, strict=True)]
    assert answers(together) == answers(alone)
    assert len({output.outputs[0].text for output in together}) > 20


def test_seeds_bring_answers_back(llm):
    def texts(seed):
        params = SamplingParams(n=3, temperature=1, max_tokens=12, seed=seed)
        (output,) = llm.generate(FIBONACCI, params)
        assert [answer.index for answer in output.outputs] == [0, 1, 2]
        return [answer.text for answer in output.outputs]

    assert texts(5) == texts(5)
    assert len({*texts(5), *texts(6)}) == 6


def test_stop_strings_and_stop_tokens(llm, tokenizer):
    (output,) = llm.generate(FIBONACCI, greedy(40))
    text, ids = output.outputs[0].text, output.outputs[0].token_ids
    pieces = [tokenizer.decode([id]) for id in ids]
    spans = (pieces[n][-1:] + pieces[n + 1][:2] for n in range(8, 39))
    stop = next(s for s in spans if len(s) == 3 and s not in pieces)  # astride two tokens
    for include in (False, True):
        params = greedy(40, stop=["never said", stop], include_stop_str_in_output=include)
        (answer,) = llm.generate(FIBONACCI, params)[0].outputs
        assert answer.text == text[: text.index(stop) + len(stop) * include]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert answer.token_ids == ids[: len(answer.token_ids)]
    (answer,) = llm.generate(FIBONACCI, greedy(40, stop_token_ids=[ids[9]]))[0].outputs
    first = ids.index(ids[9])
    assert answer.token_ids == ids[: first + 1] and answer.text == tokenizer.decode(ids[:first])
    assert (answer.finish_reason, answer.stop_reason) == ("stop", ids[9])


def test_logprobs_have_vllms_shapes_and_the_models_values(llm, tokenizer, reference):
    ids = tokenizer.encode(FIBONACCI)
    params = SamplingParams(
        temperature=1, seed=3, max_tokens=10, logprobs=2, prompt_logprobs=1, top_p=0.99
    )
    (output,) = llm.generate({"prompt_token_ids": ids}, params)
    (answer,) = output.outputs
    want = reference([*ids, *answer.token_ids])
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(ids)
    positions = [*output.prompt_logprobs[1:], *answer.logprobs]
    for n, (position, row) in enumerate(zip(positions, want, strict=False)):
        chosen, most = [*ids, *answer.token_ids][n + 1], 1 if n < len(ids) - 1 else 2
        assert next(iter(position)) == chosen and most <= len(position) <= most + 1
        assert {*np.argsort(row)[-most:].tolist(), chosen} == set(position)
        for id, entry in position.items():
            assert math.isclose(entry.logprob, row[id], abs_tol=LOGPROB_ATOL)
            assert entry.rank == 1 + (row > row[id]).sum()
            assert entry.decoded_token == tokenizer.decode([id])
    total = sum(
        position[id].logprob for position, id in zip(answer.logprobs, answer.token_ids, strict=True)
    )
    assert math.isclose(answer.cumulative_logprob, total, rel_tol=1e-6)
    (only,) = llm.generate({"prompt_token_ids": ids}, greedy(3, logprobs=0))
    assert [len(position) for position in only.outputs[0].logprobs] == [1, 1, 1]


def test_a_prompt_is_scored_without_an_answer(llm, tokenizer, heldout, reference):
    ids = tokenizer.encode(heldout[1000:1400])[:60]  # in one chunk with nothing cached
    for _ in range(2):  # the second time its pages are cached, and are read anew for the scores
        (output,) = llm.generate({"prompt_token_ids": ids}, greedy(0, prompt_logprobs=0))
        got = [
            position[id].logprob
            for position, id in zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        ]
        want = reference(ids)[np.arange(59), ids[1:]]
        np.testing.assert_allclose(got, want, atol=LOGPROB_ATOL, rtol=0)
        assert output.finished and output.outputs[0].token_ids == []


def test_chat(llm, tokenizer):
    (single,) = llm.chat(CHAT, greedy(12))
    assert single.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert answers([single]) == answers(llm.generate(single.prompt, greedy(12)))
    other = [{"role": "user", "content": "import os"}]
    both = llm.chat([other, CHAT], greedy(12))
    assert answers(both) == answers([*llm.chat(other, greedy(12)), single])


@pytest.mark.parametrize("eos", [0, 2])
def test_either_eos_ends_a_chat(llm, eos):
    params = greedy(20, logit_bias={eos: 100}, min_tokens=4)
    (answer,) = llm.chat(CHAT, params)[0].outputs
    assert len(answer.token_ids) == 5 and answer.token_ids[-1] == eos
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert answer.text and "<|" not in answer.text
    params = greedy(20, logit_bias={eos: 100}, ignore_eos=True)
    (answer,) = llm.chat(CHAT, params)[0].outputs
    assert answer.token_ids == [eos] * 20 and answer.finish_reason == "length"


def test_the_context_is_the_most_an_answer_takes(llm, engine):
    (output,) = llm.generate(FIBONACCI, greedy(10_000, ignore_eos=True))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == MAX_MODEL_LEN
    engine.check()


@pytest.mark.parametrize(
    ("bad", "params", "said"),
    [
        ({"prompt_token_ids": [5] * MAX_MODEL_LEN}, greedy(4), r"prompts\[2\]: .*256"),
        ({"prompt_token_ids": [4096]}, greedy(4), r"prompts\[2\].*4096"),
        ({"prompt_token_ids": []}, greedy(4), r"prompts\[2\]"),
        ("", greedy(4), r"prompts\[2\]"),
        (7.5, greedy(4), r"prompts\[2\] must be a string"),
        (FIBONACCI, greedy(4, logit_bias={4096: 1.0}), r"prompts\[0\]: .*logit_bias.*4096"),
        (FIBONACCI, greedy(4, stop_token_ids=[4096]), r"prompts\[0\]: .*stop_token_ids.*4096"),
        (FIBONACCI, greedy(4, logprobs=21), r"prompts\[0\]: .*logprobs"),
    ],
)
def test_one_bad_prompt_raises_before_anything_runs(llm, engine, bad, params, said):
    before = engine.stats()
    with pytest.raises(InvalidRequest, match=said):
        llm.generate([FIBONACCI, "x", bad], params)
    assert not engine.has_work and engine.stats() == before
    engine.check()
    assert llm.generate("x", greedy(1))[0].finished


def test_bad_sampling_params_are_refused_when_made():
    for fields in (
        *({"temperature": math.nan}, {"temperature": -1.0}, {"top_p": 0.0}, {"n": 0}),
        *({"max_tokens": 0}, {"max_tokens": -3}, {"stop": ["s"] * (MAX_STOP_STRINGS + 1)}),
    ):
        with pytest.raises(InvalidRequest, match=next(iter(fields))):
            SamplingParams(**fields)


def test_the_same_bits_alone_and_among_neighbours(deterministic, heldout):
    """The whole point of `deterministic`: tokens and log-probabilities, exactly."""
    prompts = [heldout[at * 900 : at * 900 + 20 + at] for at in range(12)]
    for kind in ({"temperature": 0}, {"temperature": 1, "seed": 9}):
        params = SamplingParams(max_tokens=10, logprobs=3, **kind)
        alone = answers([deterministic.generate(prompt, params)[0] for prompt in prompts])
        assert answers(deterministic.generate(prompts, params)) == alone


def test_default_parameters_are_the_models(deterministic):
    params = deterministic.default_sampling_params()
    assert (params.temperature, params.max_tokens) == (1.0, 16)
    (output,) = deterministic.generate(FIBONACCI)
    assert 1 <= len(output.outputs[0].token_ids) <= 16


def test_what_cannot_be_built_says_why(tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        LLM(tmp_path / "nowhere")
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        LLM(tmp_path)
    with pytest.raises(PlanError, match="max_position_embeddings=2048"):
        LLM(DEMO_MODEL, max_model_len=4096)
    with pytest.raises(PlanError, match="num_pages=3 cannot hold"):
        LLM(DEMO_MODEL, num_pages=3)
    with pytest.raises(ValueError, match="int3"):
        LLM(DEMO_MODEL, dtype="int3")


def test_the_package_names_what_it_offers():
    assert xlinfer.LLM is LLM and {"LLM", "SamplingParams", "load_model"} <= set(dir(xlinfer))
