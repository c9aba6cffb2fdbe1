"""Short rows through `loglikelihood`: against one request at a time, and against the engine alone.

The engine alone is given the same requests in the same order, tokenized beforehand, and nothing is
made of what it says. No row is as long as a page, so the prefix cache has nothing. On a CPU a token
costs the same in any batch: what one request at a time pays for is padding and dispatch, so the
shorter the rows, the more it loses. XLINFER_BENCH_ROWS sets how many rows there are.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean
from typing import NamedTuple

import numpy as np

from tools.bench.report import spread
from xlinfer.request import Request
from xlinfer.score.options import TaskOptions
from xlinfer.score.rows import BadRow, Row
from xlinfer.score.scorer import QUEUED, make_scorer
from xlinfer.score.tasks.loglikelihood import loglikelihood
from xlinfer.serve.build import DEMO_MODEL, Built, EngineOptions, build

ROWS = 100_000
ALONE = 300  # rows that are scored one at a time
ROUNDS = 5  # of engine and scorer in turn: a shared machine's speed drifts


def main() -> dict:
    count = int(os.environ.get("XLINFER_BENCH_ROWS", ROWS)) // ROUNDS
    # As many rows as fill a step of 512 tokens.
    options = EngineOptions(model=str(DEMO_MODEL), max_num_seqs=224, max_model_len=64)
    built = build(options, lambda stage, done, total: None)
    scored(built, 2000)  # memory is touched for the first time
    took: dict[Callable, list[Took]] = {scored: [], engine_alone: [], one_at_a_time: []}
    for n in range(ROUNDS):
        both = (engine_alone, scored) if n % 2 else (scored, engine_alone)
        for how in both:
            took[how].append(how(built, count))
        took[one_at_a_time].append(one_at_a_time(built, ALONE // ROUNDS))
    rate = lambda how: 1e6 / mean(one.wall_us for one in took[how])
    cpu_us = lambda how: mean(one.cpu_us for one in took[how])
    pairs = zip(took[scored], took[engine_alone], strict=True)
    sizes = [len(r.prompt_token_ids) for r in requests(built, 1000)]
    return {
        "rows": count * ROUNDS,
        "tokens_of_a_row": mean(sizes),
        "rows_per_s": rate(scored),
        "engine_alone_rows_per_s": rate(engine_alone),
        "one_at_a_time_rows_per_s": rate(one_at_a_time),
        "times_one_at_a_time": rate(scored) / rate(one_at_a_time),
        "overhead_over_engine": rate(engine_alone) / rate(scored) - 1,
        "overhead_by_round": spread([one.wall_us / other.wall_us - 1 for one, other in pairs]),
        "row_cpu_us": cpu_us(scored),  # of all threads: what other processes take does not count
        "engine_alone_row_cpu_us": cpu_us(engine_alone),
        "cpu_overhead_over_engine": cpu_us(scored) / cpu_us(engine_alone) - 1,
    }


class Took(NamedTuple):
    """For each row."""

    wall_us: float
    cpu_us: float


@contextmanager
def timed(rows: int) -> Iterator[list[Took]]:
    """What the block took is appended once it has ended."""
    found: list[Took] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    took = time.perf_counter() - wall, time.process_time() - cpu
    found.append(Took(*(1e6 * seconds / rows for seconds in took)))


def rows(built: Built, count: int) -> Iterator[Row]:
    """Two words and a third: about four tokens, of which the last one or two are scored."""
    rng = np.random.default_rng(0)
    strings = built.tokenizer.token_strings(range(built.tokenizer.vocab_size))
    spaced = (text[1:] for text in strings if text[:1] == "Ġ")
    words = sorted(word for word in spaced if word.isascii() and word.isalpha() and len(word) < 9)
    for number, picked in enumerate(rng.integers(0, len(words), (count, 3)).tolist()):
        first, second, third = (words[i] for i in picked)
        values = {"context": f"{first} {second}", "continuation": f" {third}"}
        yield Row(number=number, id=str(number), values=values)


def scored(built: Built, count: int) -> Took:
    """Through the task."""
    scorer = make_scorer(built, TaskOptions(task="loglikelihood"))
    with timed(count) as took:
        results = [result for _, result, _ in scorer(rows(built, count))]
    assert len(results) == count and not any(isinstance(one, BadRow) for one in results)
    return took[0]


def requests(built: Built, count: int) -> list[Request]:
    listed = list(rows(built, count))
    made = loglikelihood(built)(listed)
    ready = [work for work in made if not isinstance(work, BadRow)]
    return [request for work in ready for request in work.requests]


def engine_alone(built: Built, count: int) -> Took:
    engine, asked = built.engine, requests(built, count)
    asked.sort(key=lambda r: -len(r.prompt_token_ids))
    most, running, done, coming = QUEUED * engine.plan.max_num_seqs, 0, 0, iter(asked)
    with timed(count) as took:
        while done < count:
            while running < most and (request := next(coming, None)) is not None:
                engine.add_request(request)
                running += 1
            ended = sum(out.finish_reason is not None for out in engine.step())
            done, running = done + ended, running - ended
    return took[0]


def one_at_a_time(built: Built, count: int) -> Took:
    engine, asked = built.engine, requests(built, count)
    with timed(count) as took:
        for request in asked:
            engine.add_request(request)
            while engine.has_work:
                engine.step()
    return took[0]
