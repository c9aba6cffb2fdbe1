import pytest

from tests.serve.conftest import REPLY
from tests.serve.fake_engine import logprobs_of
from xlinfer.request import InvalidRequest, SamplingParams, TokenLogprobs, TokenOutput
from xlinfer.serve.text import Logprob, TextRequest, position_logprobs, tokenize_bad_words

PROMPT = (5, 6, 7)


def answer(tokenizer, sampling, outputs) -> TextRequest:
    text = TextRequest("r", PROMPT, sampling, tokenizer=tokenizer, eos_token_ids=(0,))
    for token_ids, finish in outputs:
        text.add(TokenOutput(request_id="0_r", token_ids=token_ids, finish_reason=finish))
    return text


def test_requests_of_n_answers(tokenizer):
    sampling = SamplingParams(n=3, prompt_logprobs=2, bad_words=["def"])
    text = TextRequest("r", PROMPT, sampling, tokenizer=tokenizer, priority=4, cache_salt="s")
    assert [request.request_id for request in text.requests] == ["0_r", "1_r", "2_r"]
    assert [request.answer_index for request in text.requests] == [0, 1, 2]
    # The prompt is scored once.
    assert [request.sampling.prompt_logprobs for request in text.requests] == [2, None, None]
    assert {(r.priority, r.cache_salt, r.prompt_token_ids) for r in text.requests} == {
        (4, "s", PROMPT)
    }
    assert text.requests[0].bad_words_token_ids == tokenize_bad_words(["def"], tokenizer)


def test_bad_words_with_and_without_a_space(tokenizer):
    (plain, spaced) = tokenize_bad_words(["  return"], tokenizer)
    assert plain == tuple(tokenizer.encode("return"))
    assert spaced == tuple(tokenizer.encode(" return"))
    with pytest.raises(InvalidRequest, match="only spaces"):
        tokenize_bad_words([" "], tokenizer)


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_an_answer_wherever_tokens_are_cut(tokenizer, size, include):
    ids = tokenizer.encode(REPLY)
    sampling = SamplingParams(stop=["turn a"], include_stop_str_in_output=include, max_tokens=99)
    pieces = [(ids[start : start + size], None) for start in range(0, len(ids), size)]
    output = answer(tokenizer, sampling, pieces).output().outputs[0]
    end = REPLY.index("turn a") + len("turn a") * include
    assert output.text == REPLY[:end]
    assert (output.finish_reason, output.stop_reason) == ("stop", "turn a")
    spoken = tokenizer.decode(output.token_ids)
    assert "turn a" in spoken and "turn a" not in tokenizer.decode(output.token_ids[:-1])


def test_stop_asks_for_an_abort_once_and_only_while_the_engine_runs(tokenizer):
    ids = tokenizer.encode("one two three")
    text = TextRequest("r", PROMPT, SamplingParams(stop="two"), tokenizer=tokenizer)
    delta, abort = text.add(TokenOutput(request_id="0_r", token_ids=ids))
    assert abort and text.finished and delta.text == "one "
    late, abort = text.add(TokenOutput(request_id="0_r", token_ids=ids, finish_reason="length"))
    assert (late.text, late.token_ids, abort) == ("", [], False)
    assert text.output().outputs[0].finish_reason == "stop"
    ended = TextRequest("r", PROMPT, SamplingParams(stop="two"), tokenizer=tokenizer)
    _, abort = ended.add(TokenOutput(request_id="0_r", token_ids=ids, finish_reason="length"))
    assert not abort and ended.answers[0].stop_reason == "two"


def test_held_text_comes_out_at_the_end(tokenizer):
    ids = tokenizer.encode("abc tw")
    text = TextRequest("r", PROMPT, SamplingParams(stop="two"), tokenizer=tokenizer)
    delta, _ = text.add(TokenOutput(request_id="0_r", token_ids=ids))
    assert delta.text == "abc "
    delta, _ = text.add(TokenOutput(request_id="0_r", finish_reason="length"))
    assert delta.text == "tw" and delta.finish_reason == "length"


def test_stop_strings_wait_for_min_tokens(tokenizer):
    ids = tokenizer.encode("two one two")
    early = answer(tokenizer, SamplingParams(stop="two"), [(ids, "length")])
    late = answer(tokenizer, SamplingParams(stop="two", min_tokens=2), [(ids, "length")])
    assert (early.answers[0].text, late.answers[0].text) == ("", "two one ")


@pytest.mark.parametrize(("include", "said"), [(False, "one"), (True, "one<|im_end|>")])
def test_the_ending_token_is_not_said(tokenizer, include, said):
    ids = [*tokenizer.encode("one"), 2]
    sampling = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=include)
    text = answer(tokenizer, sampling, [(ids, "stop")])
    assert text.answers[0].text == said and text.answers[0].token_ids == ids


def test_without_detokenizing_there_are_only_tokens(tokenizer):
    text = answer(tokenizer, SamplingParams(detokenize=False), [([9, 9], "length")])
    assert (text.answers[0].text, text.answers[0].token_ids) == ("", [9, 9])


def test_logprobs_have_vllms_shape(tokenizer):
    sampling = SamplingParams(logprobs=2, prompt_logprobs=1)
    text = TextRequest("r", PROMPT, sampling, tokenizer=tokenizer, prompt="abc")
    text.add(
        TokenOutput(
            request_id="0_r",
            token_ids=[9, 10],
            logprobs=[logprobs_of(9, 2), logprobs_of(10, 2)],
            prompt_logprobs=[None, logprobs_of(6, 1), logprobs_of(7, 1)],
            finish_reason="length",
            num_cached_tokens=2,
        )
    )
    output = text.output()
    assert (output.prompt, output.prompt_token_ids) == ("abc", [5, 6, 7])
    assert output.finished and output.num_cached_tokens == 2 and output.outputs[0].finished()
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1] == {
        6: Logprob(logprob=-1.5, rank=2, decoded_token=tokenizer.token_text(6)),
        7: Logprob(logprob=-1.0, rank=1, decoded_token=tokenizer.token_text(7)),
    }
    only = output.outputs[0]
    assert only.cumulative_logprob == -3.0
    assert [list(position) for position in only.logprobs or ()] == [[9, 10], [10, 11]]


def test_an_unlikely_token_keeps_its_own_rank(tokenizer):
    position = TokenLogprobs(token_ids=(50, 1, 2), logprobs=(-9.0, -1.0, -2.0), rank=77)
    ranks = [entry.rank for entry in position_logprobs(position, tokenizer).values()]
    assert ranks == [77, 1, 2]
