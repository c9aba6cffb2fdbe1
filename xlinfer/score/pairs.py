"""Contexts and continuations as tokens, cut as lm-evaluation-harness cuts them."""

from collections.abc import Sequence
from dataclasses import dataclass

from xlinfer.config import GenerationConfig
from xlinfer.request import InvalidRequest
from xlinfer.score.rows import BadRow
from xlinfer.serve.tokenizer import Tokenizer, check_unicode


@dataclass(frozen=True)
class Pair:
    """The whole's tokens; the continuation is those from `start` on."""

    tokens: tuple[int, ...]
    start: int


def prefix_token(generation: GenerationConfig) -> int:
    """What stands before a text without context: the model's BOS, or else its EOS. Raises
    ValueError."""
    if generation.bos_token_id is not None:
        return generation.bos_token_id
    if not generation.eos_token_ids:
        raise ValueError("The model names neither bos_token_id nor eos_token_id: say which token a "
                         "text without context follows.")  # fmt: skip
    return generation.eos_token_ids[0]


def encode(tokenizer: Tokenizer, texts: Sequence[str], bos: str) -> list[list[int]]:
    """With the special tokens that the tokenizer adds, but no second BOS."""
    begun = [n for n, text in enumerate(texts) if bos and text.startswith(bos)]
    if not begun:
        return tokenizer.encode_batch(texts)
    plain = tokenizer.encode_batch([texts[n] for n in begun], add_special_tokens=False)
    tokens = tokenizer.encode_batch(texts)
    for n, ids in zip(begun, plain, strict=True):
        tokens[n] = ids
    return tokens


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], prefix: int
) -> list[Pair | BadRow]:
    """Trailing spaces of a context belong to its continuation, since tokens begin with spaces; the
    whole is encoded, and cut where the context's own tokens end."""
    done: list[Pair | BadRow | None] = [None] * len(pairs)
    alone: list[tuple[int, str]] = []  # continuations of nothing
    texts: list[tuple[int, str, str]] = []  # (pair, context, whole)
    for n, (context, continuation) in enumerate(pairs):
        try:
            check_unicode(context, "context")
            check_unicode(continuation, "continuation")
        except InvalidRequest as error:
            done[n] = BadRow(str(error))
            continue
        if context == "":
            alone.append((n, continuation))
        else:
            texts.append((n, context.rstrip(), context + continuation))
    bos = tokenizer.decode([prefix], skip_special_tokens=False)
    plain = tokenizer.encode_batch([text for _, text in alone], add_special_tokens=False)
    for (n, _), ids in zip(alone, plain, strict=True):
        begun = ids[:1] == [prefix]
        done[n] = _pair(ids if begun else [prefix, *ids], 1)
    # A context that many continue is encoded once.
    contexts = list(dict.fromkeys(context for _, context, _ in texts))
    ids = encode(tokenizer, [*contexts, *(whole for _, _, whole in texts)], bos)
    lengths = {c: len(ids) for c, ids in zip(contexts, ids[: len(contexts)], strict=True)}
    for (n, context, _), whole in zip(texts, ids[len(contexts) :], strict=True):
        done[n] = _pair(whole, lengths[context]) if lengths[context] else _pair([prefix, *whole], 1)
    return [pair for pair in done if pair is not None]


def _pair(tokens: list[int], start: int) -> Pair | BadRow:
    if start >= len(tokens):
        return BadRow("the continuation has no tokens of its own")
    return Pair(tuple(tokens), start)
