"""lm-evaluation-harness over the model `xlinfer`, on local tasks, against the plain forward."""

import json
import subprocess
import sys
from typing import Any

import datasets.config
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.score.conftest import CONTEXT
from xlinfer.eval import with_model
from xlinfer.score.evaluation import XlinferLM
from xlinfer.serve.build import DEMO_MODEL
from xlinfer.serve.llm import LLM

ATOL = 1e-3
QUESTIONS = [
    {"question": "import", "choices": ["os", "banana", "def"], "gold": 0},
    {"question": "def add(a, b):\n    return a", "choices": ["+ b", "- - -", "import"], "gold": 0},
    {"question": "for i in", "choices": ["while", "range(10):", "class"], "gold": 1},
    {"question": "if x is not", "choices": ["None:", "lambda", "yield"], "gold": 2},
]
TEXTS = [{"text": "import os\nimport sys\n"}, {"text": "def f(x):\n    return x\n\n" * 20}]
TASKS = {
    "choose": """
task: choose
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "roll": """
task: roll
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
""",
    "write": """
task: write
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
""",
}
SOURCE = """dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of them, with their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        docs, file = TEXTS if name == "roll" else QUESTIONS, folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (folder / f"{name}.yaml").write_text((text + SOURCE).format(file=file))
    return folder


@pytest.fixture(scope="module")
def model(built):
    return XlinferLM(LLM.over(built), max_gen_toks=9)


@pytest.fixture(scope="module")
def found(model, tasks, tmp_path_factory):
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )


def test_choices_equal_the_full_forward(found, built, scores):
    encode = built.tokenizer.encode
    for sample in found["samples"]["choose"]:
        doc = sample["doc"]
        for choice, (got, greedy) in zip(doc["choices"], sample["filtered_resps"], strict=True):
            whole = encode(f"{doc['question']} {choice}")
            want, is_greedy = scores(whole, len(encode(doc["question"])))
            assert (float(got), greedy) == (pytest.approx(sum(want), abs=ATOL), is_greedy)
    accuracy = [s["acc"] for s in found["samples"]["choose"]]
    assert found["results"]["choose"]["acc,none"] == pytest.approx(sum(accuracy) / 4)


def test_rolling_equals_the_full_forward(found, built, scores):
    for sample in found["samples"]["roll"]:
        tokens = [0, *built.tokenizer.encode(sample["doc"]["text"])]
        total, told = 0.0, 1
        while told < len(tokens):
            end = min(len(tokens), CONTEXT if told == 1 else told + CONTEXT - 1)
            first = max(end - CONTEXT, 0)
            total, told = total + sum(scores(tokens[first:end], told - first)[0]), end
        assert len(tokens) > CONTEXT or sample["doc"] == TEXTS[0]
        assert sample["filtered_resps"][0] == pytest.approx(total, abs=ATOL)


def test_answers_are_greedy_to_the_stop(found, built, plain):
    for sample in found["samples"]["write"]:
        tokens = built.tokenizer.encode(sample["doc"]["question"])
        count = len(tokens)
        for _ in range(6):
            tokens.append(int(plain(tokens)[0][-1].argmax()))
        want = built.tokenizer.decode(tokens[count:]).split("\n")[0]
        assert sample["filtered_resps"] == [want]


def instance(kind: Any, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_long_contexts_are_cut_from_the_left(model, built, scores):
    encode = built.tokenizer.encode
    context = "x = 1\n" * 80
    (got,) = model.loglikelihood([instance("loglikelihood", context, "y = 2")], disable_tqdm=True)
    whole, start = encode(context + "y = 2"), len(encode(context.rstrip()))
    kept = whole[-CONTEXT:]
    want, _ = scores(kept, CONTEXT - (len(whole) - start))
    assert got[0] == pytest.approx(sum(want), abs=ATOL)
    kwargs = {"until": ["\n\n"], "max_gen_toks": 5}
    (text,) = model.generate_until([instance("generate_until", context, kwargs)], disable_tqdm=True)
    assert text


def test_no_text_is_certain(model):
    assert model.loglikelihood_rolling([instance("x", "")], disable_tqdm=True) == [0.0]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_beams": 4}, "num_beams are not sampling parameters"),
        ({"max_gen_toks": CONTEXT}, "leaves no room"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, kwargs, says):
    with pytest.raises(ValueError, match=says):
        model.generate_until([instance("generate_until", "a", kwargs)], disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dtype": "float32"}, "dtype: the LLM that is given was built already"),
        ({"max_length": CONTEXT + 1}, f"2 to the model's {CONTEXT}"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(built, arguments, says):
    with pytest.raises(ValueError, match=says):
        XlinferLM(LLM.over(built), **arguments)


def test_the_cache_hook_hears_every_result(model):
    heard = []

    class Hook:
        def add_partial(self, kind, arguments, result):
            heard.append((kind, arguments, result))

    before, model.cache_hook = model.cache_hook, Hook()
    try:
        (score,) = model.loglikelihood([instance("loglikelihood", "a", " b")], disable_tqdm=True)
        (total,) = model.loglikelihood_rolling([instance("x", "a b")], disable_tqdm=True)
    finally:
        model.cache_hook = before
    rolling = ("loglikelihood_rolling", ("a b",), total)
    assert heard == [("loglikelihood", ("a", " b"), score), rolling]


def test_chat_goes_by_the_template(model, built):
    history = [{"role": "user", "content": "hi"}]
    want = LLM.over(built).render(history)
    assert model.apply_chat_template(history) == want and "hi" in want
    assert model.chat_template(True) == built.tokenizer.chat_template.source


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        (["--tasks", "a"], ["run", "--model", "xlinfer", "--tasks", "a"]),
        (["run", "--tasks", "a"], ["run", "--model", "xlinfer", "--tasks", "a"]),
        (["--model", "hf"], ["--model", "hf"]),
        (["--model=hf"], ["--model=hf"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        ([], []),
    ],
)
def test_the_command_names_the_model(argv, want):
    assert with_model(["eval", *argv]) == ["eval", *want]


@pytest.mark.slow
def test_the_command(tasks, tmp_path):
    """As a user of the harness has it, without torch and without a network."""
    sizes = "max_model_len=64,max_num_seqs=2,max_num_batched_tokens=32"
    arguments = f"pretrained={DEMO_MODEL},dtype=float32,{sizes}"
    done = subprocess.run(
        [sys.executable, "-m", "xlinfer.eval", "--model_args", arguments, "--tasks", "choose",
         "--include_path", str(tasks), "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1",
             "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "choose" in done.stdout and "acc_norm" in done.stdout
    (file,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(file.read_text())["config"]["model"] == "xlinfer"


def test_the_commands_errors_are_one_line(tasks, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "xlinfer.eval", "--model_args", f"pretrained={tmp_path}/none",
         "--tasks", "choose", "--include_path", str(tasks)],
        capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1",
             "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and f"{tmp_path}/none" in last
