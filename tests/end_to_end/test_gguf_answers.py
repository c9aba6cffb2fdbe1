"""A GGUF file answers as the checkpoint that it was made of does: to the bit, for its weights are
the same."""

from pathlib import Path

import pytest

from tests.gguf_convert import to_gguf, tokenizer_keys
from xlinfer import LLM, SamplingParams
from xlinfer.serve.build import DEMO_MODEL

SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 96}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    return to_gguf(Path(DEMO_MODEL), path, tokenizer_keys(Path(DEMO_MODEL)))


def test_a_gguf_answers_as_its_source(file):
    def answers(model):
        llm = LLM(model, deterministic=True, **SMALL)
        greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=2)
        outputs = llm.generate(["def fibonacci(n):\n", "import "], greedy, use_tqdm=False)
        outputs += llm.chat([{"role": "user", "content": "hi"}], greedy, use_tqdm=False)
        return [(o.prompt_token_ids, o.outputs[0].text, o.outputs[0].logprobs) for o in outputs]

    assert answers(file) == answers(DEMO_MODEL)
