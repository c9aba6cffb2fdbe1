"""A row on its way through the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from xlinfer.request import Request, SamplingParams, TokenOutput
from xlinfer.score.rows import BadRow, Row
from xlinfer.serve.text import TextRequest

SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)
Result = Mapping[str, Any]


class Work(Protocol):
    """What a task asks the engine for one row, and makes of the answers."""

    row: Row

    @property
    def requests(self) -> Sequence[Request]:
        """With ids that are the row's alone."""
        ...

    def add(self, output: TokenOutput) -> bool:
        """Whether the engine must abort the request: a stop string ended it."""
        ...

    def result(self) -> Result:
        """Once every request has ended."""
        ...


Prepare = Callable[[Sequence[Row]], list[Work | BadRow]]  # beside the rows


class Logprobs(NamedTuple):
    """Of a continuation's tokens."""

    tokens: list[float]
    is_greedy: bool  # each is the likeliest after those before it

    @property
    def sum(self) -> float:
        return float(sum(self.tokens))


def logprobs_of(output: TokenOutput) -> Logprobs:
    entries = [entry for entry in output.prompt_logprobs or () if entry is not None]
    greedy = all(entry.rank == 1 for entry in entries)
    return Logprobs([entry.logprobs[0] for entry in entries], greedy)


@dataclass
class Read:
    """Prompts that the engine only reads; `finish` is given its outputs in their order."""

    row: Row
    requests: Sequence[Request]
    finish: Callable[[list[TokenOutput]], Result]
    _outputs: dict[str, TokenOutput] = field(default_factory=dict)

    def add(self, output: TokenOutput) -> bool:
        self._outputs[output.request_id] = output
        return False

    def result(self) -> Result:
        return self.finish([self._outputs[request.request_id] for request in self.requests])


@dataclass
class Written:
    """A prompt with an answer."""

    row: Row
    text: TextRequest
    finish: Callable[[TextRequest], Result]

    @property
    def requests(self) -> Sequence[Request]:
        return self.text.requests

    def add(self, output: TokenOutput) -> bool:
        return self.text.add(output)[1]

    def result(self) -> Result:
        return self.finish(self.text)


def request_id(row: Row, part: int = 0) -> str:
    return f"{row.number}_{part}"


def text_of(row: Row, name: str) -> str:
    """A column that holds text. Raises BadRow."""
    value = row.values.get(name)
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a string, got {type(value).__name__}")
    return value


def check_length(prompt: int, most: int, what: str) -> None:
    """Raises BadRow naming both."""
    if prompt > most:
        raise BadRow(f"{what} has {prompt} tokens, and the model's context is {most}")
