"""Text -> its embedding."""

from collections.abc import Sequence

from xlinfer.request import InvalidRequest, Request, TokenOutput
from xlinfer.score.options import TaskOptions
from xlinfer.score.rows import BadRow, Row
from xlinfer.score.work import Prepare, Read, Result, Work, check_length, request_id, text_of
from xlinfer.serve.build import Built
from xlinfer.serve.embeddings import finished


def embed(built: Built, options: TaskOptions) -> Prepare:
    most = built.engine.plan.max_model_len

    def prepare(rows: Sequence[Row]) -> list[Work | BadRow]:
        return [work(row) for row in rows]

    def work(row: Row) -> Work | BadRow:
        try:
            tokens = built.tokenizer.encode(text_of(row, "text"), param="text")
            check_length(len(tokens), most, "text")
        except (BadRow, InvalidRequest) as error:
            return BadRow(str(error))
        if not tokens:
            return BadRow("text has no tokens")
        request = Request(
            request_id=request_id(row), prompt_token_ids=tuple(tokens), pooling=options.pooling
        )
        return Read(row, [request], lambda outputs: result(outputs[0], len(tokens)))

    def result(output: TokenOutput, num_tokens: int) -> Result:
        assert output.pooled is not None
        vector = finished(output.pooled, options.dimensions, normalize=options.normalize)
        return {"embedding": vector.tolist(), "num_tokens": num_tokens}

    return prepare
