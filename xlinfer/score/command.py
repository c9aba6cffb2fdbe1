"""python -m xlinfer.score: a batch job, from its command line to its exit code."""

import dataclasses
import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence

from absl import flags

from xlinfer.flags import UsageError, show
from xlinfer.progress import show_progress
from xlinfer.score import layout
from xlinfer.score.display import show_rows
from xlinfer.score.flags import (
    Tasks,
    columns_of,
    help_text,
    parse,
    resources_of,
    task_options,
)
from xlinfer.score.identity import identity_of
from xlinfer.score.inputs import find_inputs
from xlinfer.score.job import State, finish, open_job, read_state, run_attempts
from xlinfer.score.manifest import Job
from xlinfer.score.parts import check_packages
from xlinfer.score.ranks import find_rank
from xlinfer.score.ray_runner import RayOptions, run_on_ray
from xlinfer.score.readers import TEXT
from xlinfer.score.report import as_text, report
from xlinfer.score.shard import Interrupted, ShardRunner, Worker
from xlinfer.score.signals import INTERRUPTED, stop_on_signals
from xlinfer.score.store import Store, StoreError, open_store
from xlinfer.serve.flags import engine_options

logger = logging.getLogger("xlinfer.score")
FAILED, MISUSED, SOME_FAILED = 1, 2, 3  # exit codes, besides INTERRUPTED


def main(argv: Sequence[str], tasks: Tasks) -> int:
    try:
        values = parse(argv, tasks)
        if values is None:
            show(help_text(tasks))
            return 0
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
        return run(values, tasks)
    except UsageError as error:
        print(f"error: {error}\nTry: python -m xlinfer.score --help", file=sys.stderr)
        return MISUSED
    except Interrupted:
        print("Interrupted. Run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def run(values: flags.FlagValues, tasks: Tasks) -> int:
    """The exit code. Raises what `main` catches."""
    task = task_options(values, tasks)
    make = functools.partial(tasks.make_worker, engine_options(values), task)
    stop = threading.Event()
    work = _work(values, make, stop)  # a slip in its flags is told before the inputs are read
    store, job = open_store(values.output), job_of(values, tasks)
    with stop_on_signals(stop):
        with show_progress() as progress:
            manifest = open_job(store, job, progress)
        state = read_state(store, manifest)
        if not state.complete or values.retry_failed:
            work(store, state)
        state = finish(store, manifest)
    if not state.complete:
        done = sum(map(bool, state.commits.values()))
        print(f"{done} of {len(state.commits)} shards are done; others run the rest.")
        return 0
    made = report(state)
    store.put(layout.REPORT, json.dumps(made, indent=2, ensure_ascii=False).encode() + b"\n")
    _draw(store, state, made)
    print(f"{store.url}: {as_text(made)}")
    return SOME_FAILED if state.failed else 0


def job_of(values: flags.FlagValues, tasks: Tasks) -> Job:
    """Raises UsageError, InputError, JobError, and what `identity_of` does."""
    check_packages(values.output_format, values.compression)
    columns, optional = columns_of(values.column, values.task, tasks.table[values.task])
    given = None if values.input_format == "auto" else values.input_format
    inputs = find_inputs(values.input, given)
    texts = [file.url for file in inputs if file.format == "text"]
    if texts:
        if len(texts) < len(inputs) or len(columns) != 1 or values.id_column is not None:
            raise UsageError(
                f"{texts[0]} is text, whose lines are a task's only column: --task={values.task} "
                f"takes {', '.join(columns)}; other files and --id_column do not go with it"
            )
        columns, optional = dict.fromkeys(columns, TEXT), {}
    return Job(
        inputs=inputs,
        columns=columns,
        optional=optional,
        # OpenAI's name for what tells requests apart.
        id_column=values.id_column or columns.get("custom_id"),
        rows_per_shard=values.rows_per_shard,
        output_format=values.output_format,
        compression=values.compression,
        task=dataclasses.asdict(task_options(values, tasks)),
        model=identity_of(engine_options(values)),
    )


type Work = Callable[[Store, State], None]


def _work(values: flags.FlagValues, make: Callable[[], Worker], stop: threading.Event) -> Work:
    """What runs the attempts that are left, as --runner says. Raises UsageError."""
    if values.runner == "ray":
        options = RayOptions(
            address=values.ray_address,
            num_actors=values.num_actors,
            resources=resources_of(values.resources_per_actor),
        )

        def on_ray(store: Store, state: State) -> None:
            attempts = state.todo(retry_failed=values.retry_failed)
            total = sum(attempt.shard.rows for attempt in attempts)
            with show_rows(total, 0) as meter:
                run_on_ray(
                    options, store.url, make, attempts,
                    stop=stop, on_rows=meter.add, on_commit=lambda commit: None,
                )  # fmt: skip

        return on_ray
    rank = None
    if values.runner == "static":
        try:
            rank = find_rank(os.environ, values.rank, values.world_size)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def here(store: Store, state: State) -> None:
        attempts = state.todo(retry_failed=values.retry_failed)
        if rank is not None:
            attempts = rank.share(attempts)
        if not attempts:
            return
        worker = make()
        if stop.is_set():
            raise Interrupted
        with show_rows(sum(attempt.shard.rows for attempt in attempts), 0) as meter:
            runner = ShardRunner(
                store=store, manifest=state.manifest, worker=worker, stop=stop, on_row=meter.row
            )
            run_attempts(runner, attempts, lambda commit: None)

    return here


def _draw(store: Store, state: State, made: dict) -> None:
    try:
        from xlinfer.score.picture import draw
    except ModuleNotFoundError as error:
        logger.warning(
            "No %s: %s is needed: pip install 'xlinfer[plot]'", layout.PICTURE, error.name
        )
        return
    store.put(layout.PICTURE, draw(made, [commit for _, commit in state.each()]))
