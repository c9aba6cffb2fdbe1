"""The command line of batch jobs. Dashes and underscores are the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from absl import flags

import xlinfer.flags
from xlinfer.flags import UsageError
from xlinfer.score.shard import Worker
from xlinfer.serve.build import EngineOptions
from xlinfer.serve.flags import define_engine_flags

USAGE = """\
python -m xlinfer.score --task=TASK --input=FILES --output=DIR [--model=MODEL] [--flag=value ...]

Scores rows of files by the million. The same command again goes on where it was interrupted.
Flags may also stand in a file, one a line: --flagfile=FILE. Dashes and underscores are the same.
Exits: 0 every row is answered, 3 some failed (DIR/errors), 75 interrupted: run it again,
1 it cannot run, 2 the command line is wrong.
"""
ROWS_PER_SHARD = 5000
RUNNERS = ("local", "static", "ray")


class Task(Protocol):
    """Columns by the task's names for them, with the name that a file has by default."""

    @property
    def about(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def optional(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What jobs are made of besides rows and files: tasks, their flags, and what runs them."""

    table: Mapping[str, Task]
    define: Callable[[flags.FlagValues], None]  # the flags of their options
    options: type[Any]  # a frozen dataclass that JSON can hold; raises ValueError
    make_worker: Callable[[EngineOptions, Any], Worker]  # by its name: Ray sends it to actors


def groups(tasks: Tasks) -> dict[str, Callable[[flags.FlagValues], None]]:
    return {
        "Task": partial(_define_task, tasks),
        "Input": _define_input,
        "Output": _define_output,
        "Runner": _define_runner,
        "Engine": define_engine_flags,
    }


def _define_task(tasks: Tasks, values: flags.FlagValues) -> None:
    about = " ".join(f"{name}: {task.about}" for name, task in tasks.table.items())
    flags.DEFINE_enum("task", None, list(tasks.table), about, flag_values=values)
    tasks.define(values)


def define_task_options(values: flags.FlagValues) -> None:
    """Of xlinfer's own tasks; `seed` is the engine's."""
    whole = partial(flags.DEFINE_integer, flag_values=values)
    number = partial(flags.DEFINE_float, flag_values=values)
    switch = partial(flags.DEFINE_bool, flag_values=values)
    whole("max_tokens", None, "generate: tokens of an answer. Default: to the context's end.", 1)
    number("temperature", 0.0, "generate: 0 takes the likeliest token.", 0.0)
    number("top_p", 1.0, "generate: sample from the likeliest tokens that have this share.", 0.0)
    flags.DEFINE_multi_string(
        "stop", [], "generate: text that ends an answer. Repeat it for more.", flag_values=values
    )
    switch("chat", False, "generate: prompts are a user's messages, or lists of messages.")
    whole("max_length", None, "perplexity: tokens of a window. Default: the model's context.", 2)
    whole(
        "stride",
        None,
        "perplexity: tokens by which windows move. Default: they share one token.",
        1,
    )
    flags.DEFINE_enum(
        "pooling", "last", ["last", "mean", "cls"], "embed: of hidden states.", flag_values=values
    )
    switch("normalize", True, "embed: to length 1.")
    whole("dimensions", None, "embed: how many to keep. Default: all.", 1)
    flags.DEFINE_list(
        "served_model_names",
        [],
        "openai_batch: names that lines may call the model. Default: any.",
        flag_values=values,
    )


def _define_input(values: flags.FlagValues) -> None:
    strings = partial(flags.DEFINE_multi_string, flag_values=values)
    strings(
        "input",
        [],
        "File, or several by a pattern (*, **, ?), here or of any store that fsspec knows (gs://, "
        "s3://, hf://, https://): JSON lines (.jsonl, .jsonl.gz, .jsonl.zst), Parquet, or text, a "
        "row a line. Repeat it for more.",
    )
    flags.DEFINE_enum(
        "input_format", "auto", ["auto", "jsonl", "parquet", "text"],
        "What the files hold. auto: what their names end with.", flag_values=values,
    )  # fmt: skip
    strings("column", [], "NAME=COLUMN: the column that is the task's NAME. Repeat it for more.")
    flags.DEFINE_string(
        "id_column",
        None,
        "Column that tells rows apart: text or integers, each once. Default: rows are called by "
        "file and line.",
        flag_values=values,
    )


def _define_output(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "output",
        None,
        "Folder, gs:// or s3:// prefix of this job: parts/, errors/, _SUCCESS, report.json.",
        flag_values=values,
    )
    one_of = partial(flags.DEFINE_enum, flag_values=values)
    one_of("output_format", "jsonl", ["jsonl", "parquet"], "Of the files in parts/.")
    one_of("compression", "none", ["none", "gz", "zst"], "Of JSON lines in parts/.")
    flags.DEFINE_integer(
        "rows_per_shard",
        ROWS_PER_SHARD,
        "Rows that are committed together, in a file of their own, and run on one worker.",
        1,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "retry_failed", False, "Score the rows that failed once more.", flag_values=values
    )


def _define_runner(values: flags.FlagValues) -> None:
    text = partial(flags.DEFINE_string, flag_values=values)
    whole = partial(flags.DEFINE_integer, flag_values=values)
    flags.DEFINE_enum(
        "runner",
        "local",
        RUNNERS,
        "local: in this process. static: this is one of several equal processes, each of which "
        "takes its share. ray: actors of a Ray cluster, as many as there are.",
        flag_values=values,
    )
    whole("rank", None, "static: which one this is. Default: as Slurm, TPU or Kubernetes say.", 0)
    whole("world_size", None, "static: how many there are. Default: as Slurm or TPU say.", 1)
    text("ray_address", None, "ray: of the cluster. Default: RAY_ADDRESS, or one made here.")
    whole("num_actors", 1, "ray: engines, each an actor.", 1)
    flags.DEFINE_multi_string(
        "resources_per_actor",
        [],
        "ray: RESOURCE=AMOUNT of each actor, as in TPU=4, GPU=1. Repeat it for more.",
        flag_values=values,
    )


def parse(argv: Sequence[str], tasks: Tasks) -> flags.FlagValues | None:
    """Flags from `argv` (program name first); None when it asks for help. Raises UsageError."""
    values = flags.FlagValues()
    for define in groups(tasks).values():
        define(values)
    if {"--help", "--helpfull", "-h", "-help"} & set(argv):
        return None
    if rest := xlinfer.flags.read(values, argv):
        raise UsageError(f"unexpected argument {rest[0]!r}; write --flag=value")
    for name in ("task", "input", "output"):
        if not values[name].value:
            raise UsageError(f"--{name} is required")
    return values


def help_text(tasks: Tasks) -> str:
    parts = [USAGE]
    for title, define in groups(tasks).items():
        values = flags.FlagValues()
        define(values)
        shown = xlinfer.flags.help_text(values, xlinfer.flags.ALIASES)
        parts.append(shown.replace("Flags:", f"{title}:", 1))
    return "\n".join(parts)


def task_options(values: flags.FlagValues, tasks: Tasks) -> Any:
    """Raises UsageError."""
    names = tasks.options.__dataclass_fields__
    given = {name: values[name].value for name in names if name in values}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    try:
        return tasks.options(**given | lists)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def columns_of(
    given: Sequence[str], task: str, needed: Task
) -> tuple[dict[str, str], dict[str, str]]:
    """The task's name of each column -> the column: those that every row must have, which those
    that are given are, and the others. Raises UsageError."""
    columns, optional = dict(needed.columns), dict(needed.optional)
    for pair in given:
        name, equals, column = pair.partition("=")
        if not equals or not column or name not in columns.keys() | optional:
            raise UsageError(
                f"--column={pair} should be NAME=COLUMN, with a name of --task={task}: "
                f"{', '.join([*needed.columns, *needed.optional])}"
            )
        optional.pop(name, None)
        columns[name] = column
    return columns, optional


def resources_of(given: Sequence[str]) -> dict[str, float]:
    """Raises UsageError."""
    found = {}
    for pair in given:
        name, _, amount = pair.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = 0.0
        if not name or found[name] <= 0:
            raise UsageError(f"--resources_per_actor={pair} should be like TPU=4 or GPU=1")
    return found
