"""python -m tests.score.fake_command: the command of batch jobs with a task in plain Python."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from absl import flags

from tests.score import fake
from xlinfer.score.command import main
from xlinfer.score.flags import Tasks
from xlinfer.score.rows import Row, Scored
from xlinfer.score.shard import Worker
from xlinfer.serve.build import EngineOptions

HANGS = "row-12"


class Task(NamedTuple):
    about: str
    columns: Mapping[str, str]
    optional: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Options:
    task: str
    switches: str | None


def define(values: flags.FlagValues) -> None:
    about = f"Folder: with `hang` in it, {HANGS} takes for ever; with `good`, bad rows are good."
    flags.DEFINE_string("switches", None, about, flag_values=values)


def make_worker(options: EngineOptions, task: Options) -> Worker:
    on = lambda name: task.switches is not None and Path(task.switches, name).exists()

    def scorer(rows: Iterable[Row]) -> Iterator[Scored]:
        for scored in fake.scorer(rows):
            if scored.row.id == HANGS and on("hang"):
                time.sleep(600)
            yield Scored(scored.row, {"good": True}, 1) if on("good") else scored

    return Worker(scorer=scorer, device="fake", roofline_tokens_per_s=None)


TASKS = Tasks(
    table={
        "fake": Task("Turns text round.", {"prompt": "prompt"}),
        "two": Task("Takes two columns.", {"a": "a", "b": "b"}),
    },
    define=define,
    options=Options,
    make_worker=make_worker,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv, TASKS))
