"""A tiny T5 from its folder to an answer: by the library, then over HTTP."""

import shutil

import httpx
import jax
import numpy as np
import openai
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from tests.checkpoints import GOLDENS
from tests.serve.fake_engine import RunningServer
from xlinfer.request import InvalidRequest, SamplingParams
from xlinfer.serve.build import EngineOptions, build
from xlinfer.serve.llm import LLM
from xlinfer.weights import load_model

LONGEST, VOCABULARY, EOS = 64, 160, 1
PROMPT = "translate English to German: That is good."
MODEL = "tiny-t5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden, with a tokenizer of one token a character that ends a prompt as T5's does."""
    folder = tmp_path_factory.mktemp("t5")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "t5" / name, folder)
    special = ["<pad>", "</s>", "<unk>"]
    known = special + [chr(32 + i) for i in range(VOCABULARY - len(special))]
    made = tokenizers.Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<unk>")
    )
    made.add_special_tokens(special)
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    made.decoder = decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def built(folder):
    options = EngineOptions(
        model=str(folder), max_num_seqs=4, max_num_batched_tokens=32, max_model_len=LONGEST
    )
    return build(options, lambda stage, done, total: None)


@pytest.fixture(scope="module")
def answer(folder):
    """Token ids of the most likely answer, by the whole forward; it may end."""
    model = load_model(folder)
    forward = jax.jit(lambda model, *args: model(*args))

    def of(prompt_ids, count: int) -> list[int]:
        inputs, tokens = np.zeros((1, LONGEST), np.int32), np.zeros((1, 32), np.int32)
        inputs[0, : len(prompt_ids)] = prompt_ids
        found = []
        while len(found) < count and EOS not in found:
            logits = forward(model, inputs, tokens, np.array([len(prompt_ids)], np.int32))
            found.append(int(np.argmax(logits[0, len(found)])))
            tokens[0, len(found)] = found[-1]
        return found

    return of


def test_the_library(built, answer):
    llm, ids = LLM.over(built), built.tokenizer.encode(PROMPT)
    assert ids[-1] == EOS and len(ids) == len(PROMPT) + 1
    prompts = [PROMPT, {"prompt_token_ids": ids[:7]}, "?"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    read = [ids, ids[:7], built.tokenizer.encode("?")]
    assert [output.prompt_token_ids for output in outputs] == read
    for output, prompt in zip(outputs, read, strict=True):
        said = output.outputs[0]
        assert said.token_ids == answer(prompt, 12)
        assert said.text == built.tokenizer.decode(said.token_ids)
    with pytest.raises(InvalidRequest, match="encoder reads at most 64 tokens"):
        llm.generate("x" * LONGEST, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="encoder gives no probabilities"):
        llm.generate(PROMPT, SamplingParams(prompt_logprobs=1), use_tqdm=False)
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "x"}], use_tqdm=False)


@pytest.fixture(scope="module")
def server(built):
    with RunningServer(
        built.engine, built.tokenizer, generation=built.generation, served_model_names=(MODEL,)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12}


def test_completions(client, built, answer):
    ids = built.tokenizer.encode(PROMPT)
    want = answer(ids, 12)
    text = built.tokenizer.decode(want)
    for prompt in (PROMPT, ids):
        done = client.completions.create(prompt=prompt, **GREEDY)
        assert done.choices[0].text == text
        assert done.usage.prompt_tokens == len(ids)
        assert done.usage.completion_tokens == len(want)
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    several = client.completions.create(prompt=[PROMPT, "?", PROMPT], n=2, **GREEDY)
    short = built.tokenizer.decode(answer(built.tokenizer.encode("?"), 12))
    assert [choice.text for choice in several.choices] == [text] * 2 + [short] * 2 + [text] * 2


def test_log_probabilities_of_the_answer(client, built, answer):
    done = client.completions.create(prompt=PROMPT, logprobs=2, **GREEDY)
    scores = done.choices[0].logprobs
    want = answer(built.tokenizer.encode(PROMPT), 12)
    assert scores.tokens == [built.tokenizer.token_text(id) for id in want]
    assert all(score == max(top.values()) for score, top in zip(
        scores.token_logprobs, scores.top_logprobs, strict=True
    ))  # fmt: skip


def test_a_prompt_as_long_as_may_be_leaves_the_answer_its_room(client):
    done = client.completions.create(
        prompt=[5] * LONGEST, model=MODEL, max_tokens=LONGEST - 1, extra_body={"ignore_eos": True}
    )
    assert done.usage.completion_tokens == LONGEST - 1
    cut = client.completions.create(
        prompt=[5] * 100, extra_body={"truncate_prompt_tokens": -1}, **GREEDY
    )
    assert cut.usage.prompt_tokens == LONGEST


@pytest.mark.parametrize(
    "asked, param, says",
    [
        ({"echo": True}, "echo", "its encoder's input"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "encoder reads"),
        ({"prompt": [5] * (LONGEST + 1)}, "prompt", "maximum context length is 64"),
        ({"prompt": "x" * 10_000}, "prompt", "maximum context length is 64"),
        ({"max_tokens": LONGEST}, "max_tokens", "at most 63 tokens, whatever the prompt"),
    ],
    ids=["echo", "prompt_logprobs", "long", "very_long", "max_tokens"],
)
def test_what_is_refused_with_400(server, asked, param, says):
    body = {"prompt": PROMPT, **GREEDY, **asked}
    refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_chat_without_a_template_is_refused_with_400(client):
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
