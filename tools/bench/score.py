"""Short rows through `loglikelihood`: against one request at a time, and against the engine alone.

The engine alone is given the same requests in the same order, tokenized beforehand, and nothing is
made of what it says. Rows are distinct, of two contexts of one word each, so that the prefix cache
has nothing; XLINFER_BENCH_ROWS sets how many there are.
"""

import os
import time
from collections.abc import Iterator

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
    count = int(os.environ.get("XLINFER_BENCH_ROWS", ROWS))
    built = build(EngineOptions(model=str(DEMO_MODEL)), lambda stage, done, total: None)
    scored(built, 2000)  # memory is touched for the first time
    alone = one_at_a_time(built, ALONE)
    rounds = []
    for n in range(ROUNDS):
        part = count // ROUNDS
        # Whoever comes second in a round has no advantage over all rounds.
        first, second = (engine_alone, scored) if n % 2 == 0 else (scored, engine_alone)
        rates = {first: first(built, part), second: second(built, part)}
        rounds.append((rates[engine_alone], rates[scored]))
    engine, scorer = (sum(count / ROUNDS for _ in rounds) for _ in range(2))
    engine_s = sum(count / ROUNDS / one for one, _ in rounds)
    scorer_s = sum(count / ROUNDS / other for _, other in rounds)
    return {
        "rows": count,
        "rows_per_s": scorer / scorer_s,
        "engine_alone_rows_per_s": engine / engine_s,
        "one_at_a_time_rows_per_s": alone,
        "times_one_at_a_time": scorer / scorer_s / alone,
        "overhead_over_engine": scorer_s / engine_s - 1,
        "overhead_by_round": spread([one / other - 1 for one, other in rounds]),
    }


def rows(count: int) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    words = ["def", "return", "import", "self", "for", "in", "range", "x", "y", "None", "True"]
    for number in range(count):
        picked = rng.integers(0, len(words), rng.integers(6, 14)).tolist()
        text = [words[i] for i in picked]
        cut = len(text) - int(rng.integers(1, 4))
        values = {"context": f"{number} {' '.join(text[:cut])}"}
        values["continuation"] = " " + " ".join(text[cut:])
        yield Row(number=number, id=str(number), values=values)


def scored(built: Built, count: int) -> float:
    """Rows a second through the task."""
    scorer = make_scorer(built, TaskOptions(task="loglikelihood"))
    started, done = time.perf_counter(), 0
    for _, result, _ in scorer(rows(count)):
        assert not isinstance(result, BadRow)
        done += 1
    assert done == count
    return count / (time.perf_counter() - started)


def requests(built: Built, count: int) -> list[Request]:
    listed = list(rows(count))
    made = loglikelihood(built)(listed)
    ready = [work for work in made if not isinstance(work, BadRow)]
    return [request for work in ready for request in work.requests]


def engine_alone(built: Built, count: int) -> float:
    engine, asked = built.engine, requests(built, count)
    asked.sort(key=lambda r: len(r.prompt_token_ids))
    most, running, done = QUEUED * engine.plan.max_num_seqs, 0, 0
    coming = iter(asked)
    started = time.perf_counter()
    while done < count:
        while running < most and (request := next(coming, None)) is not None:
            engine.add_request(request)
            running += 1
        ended = sum(out.finish_reason is not None for out in engine.step())
        done, running = done + ended, running - ended
    return count / (time.perf_counter() - started)


def one_at_a_time(built: Built, count: int) -> float:
    engine, asked = built.engine, requests(built, count)
    started = time.perf_counter()
    for request in asked:
        engine.add_request(request)
        while engine.has_work:
            engine.step()
    return count / (time.perf_counter() - started)
