"""Text of any length -> its log-probability, in windows, each token told of once."""

import math
import re
from collections.abc import Iterator, Sequence

from xlinfer.request import InvalidRequest, TokenOutput
from xlinfer.score.options import TaskOptions
from xlinfer.score.pairs import Pair, prefix_token
from xlinfer.score.rows import BadRow, Row
from xlinfer.score.tasks.loglikelihood import scored
from xlinfer.score.work import Prepare, Read, Result, Work, logprobs_of, request_id, text_of
from xlinfer.serve.build import Built


def perplexity(built: Built, options: TaskOptions) -> Prepare:
    """Raises ValueError for windows that the model's context cannot hold."""
    prefix, most = prefix_token(built.generation), built.engine.plan.max_model_len
    length = options.max_length or most
    if length > most:
        raise ValueError(f"max_length={length} is more than the model's context, {most}")
    stride = options.stride or length - 1
    if stride >= length:
        raise ValueError(f"stride must be less than a window's {length} tokens, got {stride}")

    def prepare(rows: Sequence[Row]) -> list[Work | BadRow]:
        return [work(row) for row in rows]

    def work(row: Row) -> Work | BadRow:
        try:
            text = text_of(row, "text")
            tokens = built.tokenizer.encode(text, add_special_tokens=False, param="text")
        except (BadRow, InvalidRequest) as error:
            return BadRow(str(error))
        if not tokens:
            return BadRow("text has no tokens")
        parts = windows((prefix, *tokens), length, stride)
        requests = [scored(request_id(row, n), pair) for n, pair in enumerate(parts)]
        return Read(row, requests, lambda outputs: _result(text, outputs))

    return prepare


def windows(tokens: Sequence[int], length: int, stride: int) -> Iterator[Pair]:
    """Windows of at most `length` tokens that tell, together, of every token but the first: the
    first window of all it has, each after it of `stride`, behind as much context as it holds.

    With stride = length - 1 one token is in two windows, as lm-evaluation-harness has it.
    """
    told = min(length, len(tokens))
    yield Pair(tuple(tokens[:told]), 1)
    while told < len(tokens):
        end = min(told + stride, len(tokens))
        first = end - length
        yield Pair(tuple(tokens[first:end]), told - first)
        told = end


def _result(text: str, outputs: list[TokenOutput]) -> Result:
    """Words are what white space separates. A perplexity past any float is null."""
    found = [logprobs_of(output) for output in outputs]
    total, tokens = sum(one.sum for one in found), sum(len(one.tokens) for one in found)
    words, size = len(re.split(r"\s+", text)), len(text.encode())
    return {
        "logprob": total,
        "num_tokens": tokens,
        "num_words": words,
        "num_bytes": size,
        "token_perplexity": _exp(-total / tokens),
        "word_perplexity": _exp(-total / words),
        "byte_perplexity": _exp(-total / size),
        "bits_per_byte": -total / size / math.log(2),
    }


def _exp(x: float) -> float | None:
    try:
        return math.exp(x)
    except OverflowError:
        return None
