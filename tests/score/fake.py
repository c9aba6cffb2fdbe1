"""A scorer in plain Python, the jobs that it runs, and what they should come to. No jax."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from xlinfer.score.inputs import find_inputs
from xlinfer.score.manifest import Job
from xlinfer.score.rows import BadRow, Row, Scored
from xlinfer.score.shard import Worker

WINDOW = 4  # rows that the scorer holds
BAD = "bad"  # a prompt that cannot be scored
TOKENS = 3


def answer(prompt: str) -> dict[str, Any]:
    return {"text": prompt[::-1], "length": len(prompt)}


def scorer(rows: Iterable[Row]) -> Iterator[Scored]:
    """Answers the last row of a window first."""
    held = []
    for row in rows:
        held.append(row)
        if len(held) == WINDOW:
            yield from map(score, reversed(held))
            held.clear()
    yield from map(score, reversed(held))


def score(row: Row) -> Scored:
    prompt = row.values["prompt"]
    return Scored(row, BadRow("this is bad") if prompt == BAD else answer(prompt), TOKENS)


WORKER = Worker(scorer=scorer, device="fake", roofline_tokens_per_s=None)


def prompt_of(number: int) -> str:
    return BAD if number % 7 == 3 else f'prompt {number}, naïve 🎉\t"quoted"'


def write_input(path: Path, rows: int) -> None:
    lines = (json.dumps({"prompt": prompt_of(n), "key": f"row-{n}"}) for n in range(rows))
    path.write_text("".join(f"{line}\n" for line in lines))


def job_of(*paths: Path | str, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "inputs": find_inputs([str(path) for path in paths], None),
        "columns": {"prompt": "prompt"},
        "optional": {},
        "id_column": "key",
        "rows_per_shard": 8,
        "output_format": "jsonl",
        "compression": "none",
        "task": {"task": "fake"},
        "model": {"name": "fake"},
    }
    return Job(**given | changes)


def quiet(phase: str, done: int, total: int) -> None:
    pass


def read_lines(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Of all files that it matches, by name."""
    return [
        json.loads(line)
        for path in sorted(folder.glob(pattern))
        for line in path.read_text().splitlines()
    ]


def check_output(folder: Path, rows: int) -> None:
    """Each row of `write_input` once, in order and right, and nothing else."""
    good = [n for n in range(rows) if prompt_of(n) != BAD]
    assert read_lines(folder, "parts/*") == [
        {"id": f"row-{n}", **answer(prompt_of(n))} for n in good
    ]
    errors = read_lines(folder, "errors/*")
    assert [(row["id"], row["line"], row["error"]) for row in errors] == [
        (f"row-{n}", n + 1, "this is bad") for n in range(rows) if n not in good
    ]
    success = json.loads((folder / "_SUCCESS").read_text())
    assert (success["rows"], success["failed"]) == (len(good), rows - len(good))
    assert success["tokens"] == rows * TOKENS
    assert not list(folder.glob("work/**/*.*"))
