"""What a job took, from its commits alone: whoever finishes it knows, whichever machines ran it."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from xlinfer.score.job import State
from xlinfer.score.shard import Commit

MOST_FAILURES = 20
GAP_S = 60.0  # between two shards; what is longer is an interruption


def report(state: State) -> dict[str, Any]:
    """JSON. Of several workers, seconds and rates are of the times in which any was at work, and
    `worker_seconds` all of theirs. What a worker that was lost had done is not in them, nor is the
    time between an interruption and the next run."""
    commits = [commit for _, commit in state.each()]
    seconds = covered((commit.started, commit.ended) for commit in commits)
    scored, tokens = sum(c.scored for c in commits), sum(c.scored_tokens for c in commits)
    worked = sum(c.ended - c.started for c in commits)
    per_second = lambda count: count / seconds if seconds else None
    return {
        "rows": {"answered": state.answered, "failed": state.failed, "all": state.manifest.rows},
        "tokens": sum(commit.tokens for commit in commits),
        "shards": {
            "done": sum(bool(done) for done in state.commits.values()),
            "all": len(state.manifest.shards),
        },
        "retries": len(commits) - sum(bool(done) for done in state.commits.values()),
        "seconds": seconds,
        "rows_per_s": per_second(scored),
        "tokens_per_s": per_second(tokens),
        "worker_seconds": {
            "all": worked,
            "reading": sum(commit.reading_s for commit in commits),
            "scoring": sum(commit.scoring_s for commit in commits),
            "writing": sum(commit.writing_s for commit in commits),
        },
        "devices": dict(Counter(commit.device for commit in commits)),
        "roofline": _roofline(commits),
        "failures": _failures(state),
        "task": dict(state.manifest.job.task),
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in any of them, or in a gap of at most GAP_S."""
    total, until = 0.0, None
    for begin, end in sorted(spans):
        if until is None or begin - until > GAP_S:
            until = begin
        total += max(0.0, end - until)
        until = max(until, end)
    return total


def _roofline(commits: list[Commit]) -> dict[str, Any]:
    """Tokens computed, of those that the devices could compute in the same time at the data
    sheet's rates: prefill of full steps."""
    known = [c for c in commits if c.roofline_tokens_per_s is not None]
    most = sum((c.ended - c.started) * (c.roofline_tokens_per_s or 0.0) for c in known)
    if not most:
        devices = ", ".join(sorted({commit.device for commit in commits}))
        return {"fraction": None, "why": f"the peak rates of {devices} are not known"}
    return {
        "fraction": sum(c.scored_tokens for c in known) / most,
        "tokens_per_s": most / sum(c.ended - c.started for c in known),
    }


def _failures(state: State) -> dict[str, int]:
    counts = Counter[str]()
    for done in state.commits.values():
        if done:
            counts.update(done[-1].failures)
    return dict(counts.most_common(MOST_FAILURES))


def as_text(made: dict[str, Any]) -> str:
    """A few lines for the end of a command."""
    rows, times = made["rows"], made["worker_seconds"]
    lines = [f"{rows['answered']:,} of {rows['all']:,} rows answered, {rows['failed']:,} failed"]
    if made["seconds"]:
        share = lambda name: 100 * times[name] / times["all"]
        lines += [
            f"{made['seconds']:,.1f} s: {made['rows_per_s']:,.0f} rows/s, "
            f"{made['tokens_per_s']:,.0f} tokens/s",
            f"of the workers' time: {share('scoring'):.1f} % scoring, {share('reading'):.1f} % "
            f"waiting for rows, {share('writing'):.1f} % writing",
        ]
    roofline = made["roofline"]
    if roofline["fraction"] is None:
        lines.append(f"no fraction of a roofline: {roofline['why']}")
    else:
        lines.append(f"{100 * roofline['fraction']:.1f} % of the roofline of prefill")
    lines += [f"{count:,} rows: {message}" for message, count in made["failures"].items()]
    return "\n".join(lines)
