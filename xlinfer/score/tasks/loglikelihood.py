"""Context and continuation -> the continuation's log-probabilities."""

from collections.abc import Sequence

from xlinfer.request import Request, TokenOutput
from xlinfer.score.pairs import Pair, encode_pairs, prefix_token
from xlinfer.score.rows import BadRow, Row
from xlinfer.score.work import (
    SCORED,
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


def loglikelihood(built: Built) -> Prepare:
    prefix, most = prefix_token(built.generation), built.engine.plan.max_model_len

    def prepare(rows: Sequence[Row]) -> list[Work | BadRow]:
        read = [_texts(row) for row in rows]
        good = [texts for texts in read if not isinstance(texts, BadRow)]
        pairs = iter(encode_pairs(built.tokenizer, good, prefix))
        cut = [texts if isinstance(texts, BadRow) else next(pairs) for texts in read]
        return [
            pair if isinstance(pair, BadRow) else work(row, pair)
            for row, pair in zip(rows, cut, strict=True)
        ]

    def work(row: Row, pair: Pair) -> Work | BadRow:
        try:
            check_length(len(pair.tokens), most, "context and continuation")
        except BadRow as bad:
            return bad
        return Read(row, [scored(request_id(row), pair)], lambda outputs: _result(outputs[0]))

    return prepare


def scored(name: str, pair: Pair) -> Request:
    return Request(
        request_id=name, prompt_token_ids=pair.tokens, score_from=pair.start, sampling=SCORED
    )


def _texts(row: Row) -> tuple[str, str] | BadRow:
    try:
        return text_of(row, "context"), text_of(row, "continuation")
    except BadRow as bad:
        return bad


def _result(output: TokenOutput) -> Result:
    """logprob: of the whole continuation, in nats. is_greedy: whether it is what greedy decoding
    gives."""
    found = logprobs_of(output)
    return {
        "logprob": found.sum,
        "token_logprobs": found.tokens,
        "num_tokens": len(found.tokens),
        "is_greedy": found.is_greedy,
    }
