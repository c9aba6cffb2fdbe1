"""A context and several continuations -> which is likeliest: as it stands, by byte, by token."""

from collections.abc import Sequence
from typing import Any

from xlinfer.request import TokenOutput
from xlinfer.score.pairs import encode_pairs, prefix_token
from xlinfer.score.rows import BadRow, Row
from xlinfer.score.tasks.loglikelihood import scored
from xlinfer.score.work import (
    Prepare,
    Read,
    Result,
    Work,
    check_length,
    logprobs_of,
    request_id,
    text_of,
)
from xlinfer.serve.build import Built


def choices(built: Built) -> Prepare:
    prefix, most = prefix_token(built.generation), built.engine.plan.max_model_len

    def prepare(rows: Sequence[Row]) -> list[Work | BadRow]:
        return [work(row) for row in rows]

    def work(row: Row) -> Work | BadRow:
        try:
            context, listed = text_of(row, "context"), _choices(row)
            label = _label(row, listed)
            pairs = encode_pairs(built.tokenizer, [(context, choice) for choice in listed], prefix)
            requests = []
            for n, pair in enumerate(pairs):
                if isinstance(pair, BadRow):
                    raise BadRow(f"choices[{n}]: {pair}")
                check_length(len(pair.tokens), most, f"context and choices[{n}]")
                requests.append(scored(request_id(row, n), pair))
        except BadRow as bad:
            return bad
        return Read(row, requests, lambda outputs: _result(listed, outputs, label))

    return prepare


def _choices(row: Row) -> list[str]:
    listed: Any = row.values.get("choices")
    if not isinstance(listed, list) or not listed or not all(isinstance(c, str) for c in listed):
        raise BadRow(f"choices must be a list of strings, got {str(listed)[:80]!r}")
    return listed


def _label(row: Row, listed: list[str]) -> int | None:
    label = row.values.get("label")
    if label is None:
        return None
    if isinstance(label, str) and label in listed:
        return listed.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(listed):
        return label
    raise BadRow(f"label must be one of the {len(listed)} choices or its number, got {label!r}")


def _result(listed: list[str], outputs: list[TokenOutput], label: int | None) -> Result:
    """chosen: the likeliest choice's number, from 0, by each measure; the first of equals. acc: 1
    where that is the label."""
    found = [logprobs_of(output) for output in outputs]
    sums = [one.sum for one in found]
    num_bytes = [len(choice.encode()) for choice in listed]
    num_tokens = [len(one.tokens) for one in found]
    best = lambda sizes: max(range(len(sums)), key=lambda n: sums[n] / max(sizes[n], 1))
    chosen = {"sum": best([1] * len(sums)), "bytes": best(num_bytes), "tokens": best(num_tokens)}
    result: dict[str, Any] = {
        "logprobs": sums,
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "is_greedy": [one.is_greedy for one in found],
        "chosen": chosen,
    }
    if label is not None:
        result["acc"] = {name: int(number == label) for name, number in chosen.items()}
    return result
