"""Rows through the engine, as many at once as it takes, each result as it comes."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from xlinfer.request import InvalidRequest
from xlinfer.score.options import TaskOptions
from xlinfer.score.rows import BadRow, Row, Scored, Scorer
from xlinfer.score.tasks.choices import choices
from xlinfer.score.tasks.embed import embed
from xlinfer.score.tasks.generate import generate
from xlinfer.score.tasks.loglikelihood import loglikelihood
from xlinfer.score.tasks.openai_batch import openai_batch
from xlinfer.score.tasks.perplexity import perplexity
from xlinfer.score.work import Prepare, Work
from xlinfer.serve.build import Built, TokenEngine

# For each row of a step:
WINDOW = 16  # rows of a job that are ordered by length among themselves
SLICE = 2  # rows that are made ready between two steps, which take one
QUEUED = 4  # requests in the engine: two steps are in flight, and two wait


def make_scorer(built: Built, options: TaskOptions) -> Scorer:
    """What `options.task` makes of rows. Only its caller may use the engine meanwhile. Raises
    ValueError for options that do not fit the model."""
    match options.task:
        case "openai_batch":
            return openai_batch(built, options)
        case "loglikelihood":
            prepare = loglikelihood(built)
        case "choices":
            prepare = choices(built)
        case "perplexity":
            prepare = perplexity(built, options)
        case "embed":
            prepare = embed(built, options)
        case "generate":
            prepare = generate(built, options)
        case _:
            raise ValueError(f"no scorer of task {options.task!r}")
    return lambda rows: score(built.engine, prepare, rows)


def score(engine: TokenEngine, prepare: Prepare, rows: Iterable[Row]) -> Iterator[Scored]:
    """Closing it early aborts what runs."""
    rows, fit = iter(rows), engine.max_running
    coming: list[Work] = []  # of the next window
    ready: deque[Work] = deque()  # in order
    open_: dict[str, _Open] = {}  # by request id
    exhausted = False
    try:
        while True:
            if not exhausted and len(coming) < WINDOW * fit:
                found = list(islice(rows, SLICE * fit))
                exhausted = len(found) < SLICE * fit
                for row, work in zip(found, prepare(found), strict=True):
                    if isinstance(work, BadRow):
                        yield Scored(row, work, 0)
                    else:
                        coming.append(work)
            if not ready and coming:
                ready, coming = deque(sorted(coming, key=_order)), []
            while ready and len(open_) < QUEUED * fit:
                if (bad := _start(engine, ready.popleft(), open_)) is not None:
                    yield bad
            if not open_ and not ready and exhausted:
                return
            for output in engine.step():
                if (one := open_.get(output.request_id)) is None:
                    continue
                if one.work.add(output):
                    engine.abort([output.request_id])
                elif output.finish_reason is None:
                    one.num_tokens += len(output.token_ids)
                    continue
                one.num_tokens += len(output.token_ids) - output.num_cached_tokens
                del open_[output.request_id]
                one.unfinished -= 1
                if not one.unfinished:
                    yield one.scored()
    finally:
        engine.abort(list(open_))


class _Open:
    """A row whose requests run."""

    def __init__(self, work: Work):
        self.work, self.unfinished = work, len(work.requests)
        self.num_tokens = sum(
            len(r.encoder_token_ids) + len(r.prompt_token_ids) for r in work.requests
        )

    def scored(self) -> Scored:
        try:
            return Scored(self.work.row, self.work.result(), self.num_tokens)
        except (BadRow, InvalidRequest) as error:
            return Scored(self.work.row, BadRow(str(error)), self.num_tokens)


def _start(engine: TokenEngine, work: Work, open_: dict[str, _Open]) -> Scored | None:
    """The row, if the engine refuses one of its requests."""
    one, names = _Open(work), [request.request_id for request in work.requests]
    try:
        for request in work.requests:
            engine.add_request(request)
    except InvalidRequest as error:
        engine.abort(names)
        return Scored(work.row, BadRow(str(error)), 0)
    open_.update(dict.fromkeys(names, one))
    return None


def _order(work: Work) -> tuple:
    """The longest first, so that none is left alone at the end; rows of one context one after
    another, so that the prefix cache has it."""
    first = work.requests[0]
    context = first.prompt_token_ids[: first.score_from or None]
    return -len(first.encoder_token_ids), -len(context), context, -len(first.prompt_token_ids)
