import pytest

from tests.serve.conftest import REPLY
from xlinfer.config import GenerationConfig
from xlinfer.request import InvalidRequest, SamplingParams
from xlinfer.serve.build import Built
from xlinfer.serve.llm import LLM


@pytest.fixture
def llm(engine, tokenizer) -> LLM:
    generation = GenerationConfig(eos_token_ids=(0, 2), temperature=0.5, top_k=7, max_new_tokens=9)
    return LLM.over(Built(engine=engine, tokenizer=tokenizer, generation=generation))


def test_results_are_in_the_order_of_prompts(llm, tokenizer):
    ids = tokenizer.encode("three")
    prompts = ["one", {"prompt": "two"}, {"prompt_token_ids": ids}] * 5
    params = [SamplingParams(max_tokens=20 - n) for n in range(15)]  # the last ends first
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["one", "two", None] * 5
    assert outputs[2].prompt_token_ids == ids
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20 - n for n in range(15)]
    reply = tokenizer.encode(REPLY)
    for output in outputs:
        count = len(output.outputs[0].token_ids)
        assert output.finished and output.outputs[0].finish_reason == "length"
        assert output.outputs[0].text == tokenizer.decode(
            [reply[n % len(reply)] for n in range(count)]
        )


def test_n_answers_and_stop(llm, engine):
    (output,) = llm.generate("x", SamplingParams(n=2, stop="return", max_tokens=50), use_tqdm=False)
    assert [answer.index for answer in output.outputs] == [0, 1]
    assert output.outputs[0].text == REPLY[: REPLY.index("return")]
    assert len(engine.aborted) == 2 and not engine.has_work


def test_defaults_come_from_the_models_generation_config(llm, engine):
    (output,) = llm.generate("x")
    sampling = engine.seen[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.5, 7, 9)
    assert sampling.top_p == 1.0 and engine.seen[0].eos_token_ids == (0, 2)
    assert len(output.outputs[0].token_ids) == 9


def test_chat(llm, engine, tokenizer):
    conversation = [{"role": "user", "content": "hi"}]
    (single,) = llm.chat(conversation, SamplingParams(max_tokens=1), use_tqdm=False)
    assert single.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert single.prompt_token_ids == tokenizer.encode(single.prompt)
    assert len(llm.chat([conversation] * 3, use_tqdm=False)) == 3
    partial = [*conversation, {"role": "assistant", "content": "I"}]
    (going_on,) = llm.chat(
        partial, use_tqdm=False, add_generation_prompt=False, continue_final_message=True
    )
    assert going_on.prompt is not None and going_on.prompt.endswith("<|im_start|>assistant\nI")


def test_priority(llm, engine):
    llm.generate(["a", "b"], SamplingParams(max_tokens=1), priority=[3, -1], use_tqdm=False)
    assert [request.priority for request in engine.seen] == [3, -1]


@pytest.mark.parametrize(
    ("prompts", "params", "said"),
    [
        ([1, 2, 3], None, "prompt_token_ids"),
        (["a", 3.5], None, r"prompts is a list|prompts\[1\] must be a string"),
        (["a", {"text": "b"}], None, r"prompts\[1\] must be a string"),
        ([{"prompt_token_ids": [1, 9999]}], None, r"prompts\[0\].*9999"),
        (["a", "b"], [SamplingParams()], "one for all prompts or a list of 2"),
        (["a"], ["greedy"], "must hold SamplingParams"),
        (["a", "x " * 900], None, r"prompts\[1\]: .*longer than the context"),
        (["a", "b"], SamplingParams(logit_bias={5000: 1.0}), r"prompts\[0\]: .*5000"),
        (["a\ud800"], None, "Unicode"),
    ],
)
def test_one_bad_prompt_or_parameter_runs_nothing(llm, engine, prompts, params, said):
    with pytest.raises(InvalidRequest, match=said):
        llm.generate(prompts, params)
    assert not engine.has_work and engine._generated == 0


def test_an_interrupted_call_leaves_nothing_running(llm, engine):
    engine.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"])
    assert len(engine.aborted) == 2 and not engine.has_work
    engine.fail = None
    assert llm.generate("c")[0].finished


def test_no_template(llm, tokenizer, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])
