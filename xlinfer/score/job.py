"""A job from its first command to its last: planned once, run by anyone, finished once."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from xlinfer.progress import Progress
from xlinfer.score import layout
from xlinfer.score.inputs import InputError
from xlinfer.score.layout import Attempt
from xlinfer.score.manifest import Job, JobError, Manifest, Shard, differences
from xlinfer.score.parts import suffix_of
from xlinfer.score.planning import plan
from xlinfer.score.shard import Commit, ShardRunner, publish
from xlinfer.score.store import Store

READERS = 16  # commits that are read at once: a store's answer takes long, not much
COMMIT = re.compile(rf"{layout.COMMITS}/(\d+)(?:\.retry-(\d+))?\.json")
MOST_SHOWN = 8


def open_job(store: Store, job: Job, progress: Progress) -> Manifest:
    """The plan that is in the store; `job`'s, if there is none yet. Raises JobError where the
    store holds another job, InputError for inputs that cannot be planned."""
    # In this order: whoever commits has made a manifest before.
    held = store.list(layout.COMMITS) or store.list(layout.PARTS)
    manifest = _manifest(store)
    if manifest is None:
        if held:
            raise JobError(
                f"{store.url} holds {held[0]} and no {layout.MANIFEST}: it is of a job whose plan "
                "is lost, or of something else. Name an empty --output"
            )
        made = plan(job, progress)
        if store.create(layout.MANIFEST, made.to_json()):
            return made
        manifest = _manifest(store)  # another driver was first
        assert manifest is not None
    if changed := differences(manifest.job, job):
        shown = "; ".join(changed[:MOST_SHOWN]) + ("; ..." if len(changed) > MOST_SHOWN else "")
        raise JobError(
            f"{store.url} holds another job: {shown}. Give what the job there was given to go on "
            "with it, or another --output"
        )
    return manifest


def _manifest(store: Store) -> Manifest | None:
    try:
        return Manifest.from_json(store.read(layout.MANIFEST))
    except FileNotFoundError:
        return None
    except JobError as error:
        raise JobError(f"{store.url}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class State:
    """How far a job is: the commits of each shard, by attempt."""

    manifest: Manifest
    commits: Mapping[int, Sequence[Commit]]

    def todo(self, *, retry_failed: bool) -> list[Attempt]:
        """What is left, in order: shards that nobody has committed, and with `retry_failed` those
        with rows that failed."""
        found = []
        for shard in self.manifest.shards:
            done = self.commits[shard.index]
            if not done or (retry_failed and done[-1].failed):
                found.append(Attempt(shard=shard, number=len(done)))
        return found

    @property
    def complete(self) -> bool:
        return all(self.commits.values())

    @property
    def answered(self) -> int:
        return sum(commit.rows for done in self.commits.values() for commit in done)

    @property
    def failed(self) -> int:
        return sum(done[-1].failed for done in self.commits.values() if done)

    def each(self) -> Iterator[tuple[Attempt, Commit]]:
        for shard in self.manifest.shards:
            for number, commit in enumerate(self.commits[shard.index]):
                yield Attempt(shard=shard, number=number), commit


def read_state(store: Store, manifest: Manifest) -> State:
    """What is committed, and after it also published. A listing that lags behind costs time, and
    hides nothing: what it does not name is asked for by its name."""
    listed = dict[int, int]()
    for name in store.list(layout.COMMITS):
        if found := COMMIT.fullmatch(name):
            shard, number = int(found[1]), int(found[2] or 0)
            listed[shard] = max(listed.get(shard, 0), number + 1)

    def commits_of(shard: Shard) -> list[Commit]:
        attempt, done = Attempt(shard=shard), list[Commit]()
        # A next attempt is only made where rows have failed.
        while attempt.number < listed.get(shard.index, 0) or not done or done[-1].failed:
            try:
                done.append(Commit.read(store, attempt))
            except FileNotFoundError:
                break
            attempt = attempt.after
        return done

    with ThreadPoolExecutor(READERS) as pool:
        commits = dict(enumerate(pool.map(commits_of, manifest.shards)))
    state = State(manifest=manifest, commits=commits)
    _publish_all(store, state)
    return state


def _publish_all(store: Store, state: State) -> None:
    """What workers that died between commit and publishing have left."""
    shown = {*store.list(layout.PARTS), *store.list(layout.ERRORS)}
    suffix = suffix_of(state.manifest.job)
    for attempt, commit in state.each():
        names = {attempt.part(suffix), *([attempt.errors] if commit.failed else [])}
        if not names <= shown:
            publish(store, state.manifest, attempt, commit)
    done = {attempt.work for attempt, _ in state.each()}
    left = [name for name in store.list(layout.WORK) if "/".join(name.split("/")[:2]) in done]
    store.remove(left)


def run_attempts(
    runner: ShardRunner, attempts: Iterable[Attempt], on_commit: Callable[[Commit], None]
) -> None:
    """One after the other. An input that cannot be read stops its shard alone; JobError, which
    names them, is raised when the others are done."""
    failures = []
    for attempt in attempts:
        try:
            on_commit(runner.run(attempt))
        except InputError as error:
            failures.append(str(error))
    raise_failures(failures)


def raise_failures(failures: Sequence[str]) -> None:
    if failures:
        listed = "; ".join(dict.fromkeys(failures))
        raise JobError(f"{len(failures)} shards are not done: {listed}")


def finish(store: Store, manifest: Manifest) -> State:
    """Say that all is done, if it is, and nobody has; the state."""
    state = read_state(store, manifest)
    if state.complete:
        success = _success(state)
        if state.answered + state.failed != manifest.rows:
            raise JobError(
                f"{store.url}: {state.answered} rows are answered and {state.failed} failed, of "
                f"{manifest.rows}: its commits were changed"
            )
        if not store.create(layout.SUCCESS, success) and _attempts(store) < len(list(state.each())):
            store.put(layout.SUCCESS, success)  # rows that had failed were tried again since
    return state


def _success(state: State) -> bytes:
    digest = hashlib.sha256()
    for attempt, commit in state.each():
        digest.update(f"{attempt.name} {commit.sha256}\n".encode())
    made = {
        "rows": state.answered,
        "failed": state.failed,
        "shards": len(state.manifest.shards),
        "attempts": len(list(state.each())),
        "tokens": sum(commit.tokens for _, commit in state.each()),
        "sha256": digest.hexdigest(),
    }
    return json.dumps(made, indent=2).encode() + b"\n"


def _attempts(store: Store) -> int:
    return json.loads(store.read(layout.SUCCESS))["attempts"]
