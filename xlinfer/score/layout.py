"""What a job keeps in its --output. An *attempt* is one shard's rows, or, with --retry_failed,
those of them that failed in the attempt before; ATTEMPT is 00017, or 00017.retry-1.

    manifest.json                 the plan: made first, never changed
    parts/part-ATTEMPT.jsonl      rows that were answered, in input order: `cat parts/*` is all
    errors/part-ATTEMPT.jsonl     rows that failed, and why; only where some did. Of a shard, the
                                  last attempt's are those that still fail
    commits/ATTEMPT.json          which worker's results the attempt has: made once, and that
                                  decides. Counts, seconds and the digest of the part
    work/ATTEMPT/WORKER/…         what a worker has so far: log (rows as they finish), part and
                                  errors (drafts). Gone when the attempt is done
    _SUCCESS                      made when every shard is committed: counts and a digest over all
    report.json, report.png       what it took

Each attempt is decided by the one who creates its commit. What it names is then published under
its final name, by whoever finds that it is not yet: all publish the same bytes, so a worker that
was stopped at any point, and wakes at any time, changes nothing.
"""

from dataclasses import dataclass

from xlinfer.score.manifest import Shard

MANIFEST = "manifest.json"
SUCCESS = "_SUCCESS"
REPORT = "report.json"
PICTURE = "report.png"
COMMITS, PARTS, ERRORS, WORK = "commits", "parts", "errors", "work"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    shard: Shard
    number: int = 0  # 0: all rows

    @property
    def name(self) -> str:
        return attempt_name(self.shard.index, self.number)

    @property
    def commit(self) -> str:
        return f"{COMMITS}/{self.name}.json"

    @property
    def errors(self) -> str:
        return f"{ERRORS}/part-{self.name}.jsonl"

    def part(self, suffix: str) -> str:
        return f"{PARTS}/part-{self.name}{suffix}"

    @property
    def work(self) -> str:
        return f"{WORK}/{self.name}"

    @property
    def before(self) -> "Attempt":
        return Attempt(shard=self.shard, number=self.number - 1)

    @property
    def after(self) -> "Attempt":
        return Attempt(shard=self.shard, number=self.number + 1)


def attempt_name(shard: int, number: int) -> str:
    return f"{shard:05}.retry-{number}" if number else f"{shard:05}"
