"""Tokens to text while they arrive, and stop strings found in it.

Text that has been given out is never taken back: characters whose bytes are incomplete and
letters that may yet turn out to begin a stop string are held until the next tokens decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from xlinfer.serve.tokenizer import Tokenizer

CONTEXT = 6  # prompt tokens that decide how the first new token is written, as vLLM has it
MAX_PENDING = 64  # tokens; only endless broken bytes are as many
UNDECIDED = 3  # trailing U+FFFD that may be the first bytes of a character; UTF-8 has at most four
REPLACEMENT = "\ufffd"


class Detokenizer:
    """All deltas and the `flush` together are the decoded text of all tokens.

    What a token reads as depends on those before it (a sentencepiece space, the bytes of one
    character), so new tokens are decoded behind the few that came last, their context. It moves
    on as soon as what follows is complete: the cost of a token does not grow with the answer. (A
    sentencepiece run of byte tokens that is not UTF-8 has no incremental decoding: there the
    deltas may differ from a later decode of the whole run.)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._context = self._kept(prompt_token_ids[-CONTEXT:])
        self._context_text = self._decode(self._context)
        self._pending: list[int] = []  # tokens after the context
        self._given = 0  # characters of the pending tokens' text that have been given out

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is now certain and was not before."""
        kept = self._kept(token_ids)
        if not kept:
            return ""
        if self._tokenizer.byte_fallback and len(kept) > 1:
            # One broken byte spoils all characters of a run of byte tokens: take them as they end.
            return "".join(self.add([id]) for id in kept)
        self._pending += kept
        text = self._pending_text()
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), UNDECIDED)
        delta = text[self._given : len(text) - held]
        self._given += len(delta)
        if not held:
            # A context that reads as nothing would not keep a decoder from dropping what it
            # takes for the first space of a text.
            if alone := self._decode(self._pending):
                self._context, self._context_text = self._pending, alone
                self._pending, self._given = [], 0
        elif len(self._pending) > MAX_PENDING:
            self._context, self._context_text = [], ""
            self._pending = self._pending[-MAX_PENDING // 4 :]
            self._given = len(self._decode(self._pending)) - held
        return delta

    def flush(self) -> str:
        """What was held back, once no token can complete it."""
        delta = self._pending_text()[self._given :]
        self._given += len(delta)
        return delta

    def _pending_text(self) -> str:
        text = self._decode([*self._context, *self._pending])
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        if self._context_text.endswith(REPLACEMENT):
            # The prompt ended inside a character, which the answer has completed.
            return text[_common(text, self._context_text) :]
        # Byte tokens on both sides, which do not make characters together (yet).
        return self._decode(self._pending)

    def _kept(self, token_ids: Sequence[int]) -> list[int]:
        # Left out here rather than by the decoder: a window that begins with a token of no text
        # would lose the space of the next one.
        return [id for id in token_ids if id not in self._skipped]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _common(a: str, b: str) -> int:
    """Characters with which both begin."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@dataclass
class StopStrings:
    """Looks for any of `stops` in text that arrives in pieces (Knuth, Morris and Pratt).

    The match that ends first wins; of those that end together, the first of the list.
    """

    stops: Sequence[str]
    include: bool = False  # whether the text given out ends with the stop string
    _held: str = ""  # the longest end of the text that begins a stop string
    _matched: list[int] = field(default_factory=list)  # letters of each stop seen so far
    _borders: list[list[int]] = field(default_factory=list)

    def __post_init__(self):
        self._borders = [_borders(stop) for stop in self.stops]
        self._matched = [0] * len(self.stops)

    def add(self, delta: str) -> tuple[str, str | None]:
        """(text that cannot be part of a stop string, the stop string that ended it or None)."""
        text = self._held + delta
        for index, char in enumerate(delta, start=len(self._held) + 1):
            for n, stop in enumerate(self.stops):
                self._matched[n] = _advance(stop, self._borders[n], self._matched[n], char)
            for n, stop in enumerate(self.stops):
                if self._matched[n] == len(stop):
                    self._held = ""
                    return text[: index if self.include else index - len(stop)], stop
        certain = len(text) - max(self._matched, default=0)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, its longest proper end that also begins `stop`."""
    borders, matched = [0], 0
    for char in stop[1:]:
        while matched and stop[matched] != char:
            matched = borders[matched - 1]
        matched += stop[matched] == char
        borders.append(matched)
    return borders


def _advance(stop: str, borders: list[int], matched: int, char: str) -> int:
    """How much of `stop` the text ends with after one more `char`."""
    while matched and stop[matched] != char:
        matched = borders[matched - 1]
    return matched + (stop[matched] == char)
