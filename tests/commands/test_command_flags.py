"""The command line of plan and compile, and what comes of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from converters import CheckpointError
from xlinfer.commands.costs import work_of
from xlinfer.commands.flags import define, parse, setup_of, wish_of
from xlinfer.deployment import Sizes, bytes_on_one
from xlinfer.flags import UsageError
from xlinfer.serve.build import DEMO_MODEL
from xlinfer.setup import deployment_for, deployment_of, find_target, model_config, shapes_for

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"


def values_of(*argv: str) -> flags.FlagValues:
    values = flags.FlagValues()
    define(values)
    parse(values, ["command", *argv])
    return values


def test_dashes_are_underscores_and_aliases_are_known():
    argv = (f"{DEMO_MODEL}", "--target=cpu", "--max-model-len=64", "--block-size=8")
    wish = wish_of(values_of(*argv, "--gpu-memory-utilization=0.5", "--deterministic"))
    assert wish.model == str(DEMO_MODEL) and wish.tensor_parallel_size is None
    assert wish.sizes == Sizes(
        max_model_len=64, page_size=8, hbm_utilization=0.5, deterministic=True
    )


def test_sizes_of_the_mesh():
    argv = (str(GOLDENS / "mixtral"), "--target=cpu-8", "--sequence-parallel-size=2")
    sizes = lambda *more: setup_of(values_of(*argv, *more)).axes
    four = "--tensor_parallel_size=4"
    assert sizes(four) == {"sequence": 2, "expert": 4, "tensor": 1}
    assert sizes(four, "--expert_parallel_size=1") == {"sequence": 2, "expert": 1, "tensor": 4}
    with pytest.raises(ValueError, match=r"expert_parallel_size is 3; it must divide .* 4"):
        sizes(four, "--expert_parallel_size=3")
    with pytest.raises(
        ValueError, match=r"=8 x sequence_parallel_size=2 does not divide the 8 dev"
    ):
        sizes("--tensor_parallel_size=8")
    with pytest.raises(ValueError, match=r"sequence_parallel_size=3 does not divide the 8 devices"):
        sizes("--sequence_parallel_size=3")


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--enable-expert-parallel", "leave it out, or say --expert_parallel_size"),
        ("--no-enable-expert-parallel", "write --expert_parallel_size=1"),
    ],
)
def test_vllms_switch_for_experts_is_explained(flag, says):
    with pytest.raises(UsageError, match=says):
        values_of("model", flag)


def test_flags_may_stand_in_a_file(tmp_path):
    file = tmp_path / "flags"
    file.write_text("--target=v6e-8\n--max_model_len=64\n")
    assert wish_of(values_of(f"--flagfile={file}", "model")).target == "v6e-8"
    with pytest.raises(UsageError, match="nosuch"):
        values_of("--flagfile=nosuch")


@pytest.mark.parametrize("command", ["serve", "plan", "compile", "convert", "inspect"])
def test_help_to_a_reader_who_has_seen_enough(command):
    """As `--help | head -1` leaves it."""
    ours, theirs = os.pipe()
    os.close(ours)
    argv = [sys.executable, "-m", f"xlinfer.{command}", "--help"]
    done = subprocess.run(argv, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_planned_is_what_is_compiled():
    setup = setup_of(values_of(str(DEMO_MODEL), "--target=cpu-4", "--tensor_parallel_size=2"))
    planned = deployment_of(shapes_for(setup, planned_for=find_target("cpu-4")), setup.sizes)
    compiled = deployment_for(setup)
    assert planned.memory == compiled.memory and planned.plan == compiled.plan
    assert planned.paths == compiled.paths
    assert [p.sharding.spec for p in planned.params] == [p.sharding.spec for p in compiled.params]


def test_the_number_of_programs_is_that_of_the_jobs():
    from xlinfer.commands.plan_report import report
    from xlinfer.commands.sizing import plan_for

    wish = wish_of(values_of(str(DEMO_MODEL), "--target=cpu"))
    setup, planned = setup_of(values_of(str(DEMO_MODEL), "--target=cpu")), plan_for(wish)
    count = report(planned, (), wish, context=64)["programs"]["count"]
    assert count == len(deployment_for(setup).jobs())


def test_the_text_model_alone():
    argv = (str(GOLDENS / "gemma3-images"), "--target=cpu")
    with pytest.raises(CheckpointError, match="--text_only"):
        setup_of(values_of(*argv))
    setup = setup_of(values_of(*argv, "--text-only"))
    assert model_config(setup).model_type == "gemma3_text"


def test_a_step_reads_its_tokens_rows_of_the_tables():
    """Embedding and learned positions are looked up; neither counts as a layer's weights."""
    setup = setup_of(values_of(str(GOLDENS / "gpt2"), "--target=cpu"))
    deployment = deployment_for(setup)
    work = work_of(deployment, model_config(setup))
    sizes = dict(zip(deployment.paths, map(bytes_on_one, deployment.params), strict=True))
    tables = {sizes.pop("positions_MD"), sizes.pop("embed_VD")}
    assert work.layer_bytes == sum(sizes.values()) and work.head_bytes in tables
