"""What stands in configs/ holds for this xlinfer: flags, and that the model fits."""

import json
from pathlib import Path

import pytest

from xlinfer.commands.flags import define as define_plan
from xlinfer.commands.plan import main as plan
from xlinfer.flags import ALIASES
from xlinfer.serve.flags import define, parse

ROOT = Path(__file__).parents[1]
FILES = {file.stem: file for file in (ROOT / "configs").glob("*.flags")}
# By the name before the last "_", which the target follows.
MODELS = {
    "demo": ROOT / "xlinfer" / "demo",
    **{
        name: ROOT / "tests" / "data" / "configs" / f"{config}.json"
        for name, config in {
            "deepseek_v3": "deepseek-v3-fp8",
            "gpt_oss_120b": "gpt-oss-120b",
            "gpt_oss_20b": "gpt-oss-20b",
            "llama3_70b": "llama-3.1-70b",
            "llama3_8b": "llama-3.1-8b",
            "qwen3_30b_a3b": "qwen3-30b-a3b",
        }.items()
    },
}


@pytest.mark.parametrize("name", FILES)
def test_the_server_takes_the_flags(name):
    values = parse(["serve", f"--flagfile={FILES[name]}"])
    assert values is not None and values.host == "127.0.0.1"
    assert f"--flagfile=configs/{name}.flags" in FILES[name].read_text().splitlines()[0]


SLOW = {"deepseek_v3_h200-8"}


@pytest.mark.parametrize(
    "name", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FILES]
)
def test_the_model_fits_as_the_flags_say(name, capsys):
    model, _, target = name.rpartition("_")
    values = parse(["serve", f"--flagfile={FILES[name]}"])
    assert values is not None
    shared = known_to_plan() & set(define())
    given = [f"--{flag}={values[flag].value}" for flag in sorted(shared) if values[flag].present]
    argv = ["plan", f"--model={MODELS[model]}", f"--target={target}", "--json", *given]
    code = plan(argv)
    out, err = capsys.readouterr()
    assert code == 0, err or json.loads(out)["memory"]
    made = json.loads(out)
    assert made["fits"]
    cache = made["kv_cache"]
    tokens = cache["pages"] * cache["page_tokens"]
    assert tokens >= 512 * made["programs"]["max_num_seqs"], "the rows can be filled"
    assert cache["longest_context_tokens"] >= values.max_model_len


def known_to_plan() -> set[str]:
    from absl import flags

    values = flags.FlagValues()
    define_plan(values)
    return set(values) - set(ALIASES) - {"model", "target", "help", "h"}
