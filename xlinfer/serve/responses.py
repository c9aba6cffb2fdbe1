"""The parts of answers that completions and chat share: usage, logprobs, identifiers."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from xlinfer.request import TokenLogprobs
from xlinfer.serve.text import TextRequest, position_logprobs
from xlinfer.serve.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no -infinity; vLLM's stand-in


@dataclass(frozen=True)
class Identity:
    """What every chunk of one answer repeats."""

    id: str
    created: int  # seconds since 1970
    model: str

    def head(self, object: str) -> dict:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}


def new_identity(prefix: str, request_id: str, model: str) -> Identity:
    return Identity(f"{prefix}-{request_id}", int(time.time()), model)


def new_id() -> str:
    return uuid.uuid4().hex


def usage(texts: Sequence[TextRequest]) -> dict:
    """Prompts count once, whatever n is, as OpenAI counts them."""
    prompt = sum(len(text.prompt_token_ids) for text in texts)
    completion = sum(len(answer.token_ids) for text in texts for answer in text.answers)
    cached = sum(text.num_cached_tokens for text in texts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclass(frozen=True)
class TokenNames:
    """How tokens are written in logprobs: as text, or as `token_id:N` where that was asked for."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def __call__(self, id: int) -> str:
        return f"token_id:{id}" if self.as_ids else self.tokenizer.token_text(id)


def chat_logprobs(positions: Sequence[TokenLogprobs], top: int, names: TokenNames) -> dict:
    """OpenAI's chat form: the chosen token, and its `top` most likely rivals, best first."""

    def entry(id: int, logprob: float) -> dict:
        name = names(id)
        spelled = name.encode() if names.as_ids else names.tokenizer.token_bytes(id)
        return {"token": name, "logprob": max(logprob, LEAST), "bytes": list(spelled)}

    content = []
    for position in positions:
        pairs = list(zip(position.token_ids, position.logprobs, strict=True))
        rivals = [entry(*pair) for pair in pairs[1 : top + 1]]
        content.append({**entry(*pairs[0]), "top_logprobs": rivals})
    return {"content": content}


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[TokenLogprobs | None],
    top: int,
    names: TokenNames,
    offset: int,
) -> tuple[dict, int]:
    """(OpenAI's completion form, the text offset after it). A position without logprobs (a
    prompt's first token) is null."""
    tokens, logprobs, tops, offsets = [], [], [], []
    for id, position in zip(token_ids, positions, strict=True):
        name = names(id)
        tokens.append(name)
        offsets.append(offset)
        offset += len(name)
        if position is None:
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(max(position.logprobs[0], LEAST))
        rivals: dict[str, float] = {}
        shown = len(position.token_ids) if top < 0 else top + 1
        pairs = zip(position.token_ids[:shown], position.logprobs, strict=False)
        for rival, logprob in pairs:
            rivals.setdefault(names(rival), max(logprob, LEAST))
        tops.append(rivals)
    shape = {"tokens": tokens, "token_logprobs": logprobs}
    return {**shape, "top_logprobs": tops, "text_offset": offsets}, offset


def prompt_logprobs(text: TextRequest, tokenizer: Tokenizer) -> list[dict | None] | None:
    """vLLM's form: one entry a prompt token, {id: {logprob, rank, decoded_token}}."""
    if text.prompt_logprobs is None:
        return None
    entries = []
    for position in text.prompt_logprobs:
        if position is None:
            entries.append(None)
            continue
        found = position_logprobs(position, tokenizer)
        entries.append(
            {
                str(id): {
                    "logprob": max(one.logprob, LEAST),
                    "rank": one.rank,
                    "decoded_token": one.decoded_token,
                }
                for id, one in found.items()
            }
        )
    return entries
