"""Prompt -> the model's answer."""

import hashlib
from collections.abc import Sequence

from xlinfer.request import SEED_MAX, InvalidRequest, SamplingParams
from xlinfer.score.options import TaskOptions
from xlinfer.score.rows import BadRow, Row
from xlinfer.score.work import Prepare, Result, Work, Written, check_length, text_of
from xlinfer.serve.build import Built
from xlinfer.serve.chat_template import check_messages
from xlinfer.serve.text import TextRequest


def generate(built: Built, options: TaskOptions) -> Prepare:
    """Raises ValueError where chat is asked for and the model has no template."""
    tokenizer, generation = built.tokenizer, built.generation
    most, encodes = built.engine.plan.max_model_len, bool(built.engine.plan.encode_buckets)
    if options.chat and tokenizer.chat_template is None:
        raise ValueError("chat is set, and the model has no chat template: name one to use")

    def prepare(rows: Sequence[Row]) -> list[Work | BadRow]:
        return [work(row) for row in rows]

    def work(row: Row) -> Work | BadRow:
        try:
            if options.chat:
                prompt = _rendered(built, row)
                tokens = tokenizer.encode(prompt, add_special_tokens=False)
            else:
                tokens = tokenizer.encode(prompt := text_of(row, "prompt"))
            check_length(len(tokens) + (not encodes), most, "prompt and the answer's first token")
        except (BadRow, InvalidRequest) as error:
            return BadRow(str(error))
        if not tokens:
            return BadRow("prompt has no tokens")
        sampling = SamplingParams(
            max_tokens=options.max_tokens, temperature=options.temperature, top_p=options.top_p,
            stop=options.stop, seed=_seed(options.seed, row),
        )  # fmt: skip
        text = TextRequest(
            str(row.number), tokens, sampling, tokenizer=tokenizer, prompt=prompt,
            eos_token_ids=generation.eos_token_ids,
            decoder_start=generation.decoder_start_token_ids,
        )  # fmt: skip
        return Written(row, text, _result)

    return prepare


def _rendered(built: Built, row: Row) -> str:
    prompt = row.values.get("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    checked, _ = check_messages(messages)
    assert built.tokenizer.chat_template is not None
    return built.tokenizer.chat_template.render(checked, add_generation_prompt=True)


def _seed(seed: int, row: Row) -> int:
    digest = hashlib.sha256(f"{seed}:{row.id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & SEED_MAX


def _result(text: TextRequest) -> Result:
    (answer,) = text.answers
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "num_prompt_tokens": len(text.prompt_token_ids),
        "num_tokens": len(answer.token_ids),
    }
