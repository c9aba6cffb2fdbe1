"""What a batch job can do with its rows, and what may be said of it. Plain data; no jax."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from xlinfer.request import POOLINGS, Pooling


class Task(NamedTuple):
    """Columns are by the task's names for them, with the name that a file has by default."""

    about: str
    columns: Mapping[str, str]
    optional: Mapping[str, str] = {}


TASKS: Mapping[str, Task] = {
    "generate": Task("Answers to prompts.", {"prompt": "prompt"}),
    "loglikelihood": Task(
        "Log-probabilities of continuations of contexts.",
        {"context": "context", "continuation": "continuation"},
    ),
    "perplexity": Task("Perplexity of texts, by token, word and byte.", {"text": "text"}),
    "choices": Task(
        "Which of several continuations of a context is likeliest.",
        {"context": "context", "choices": "choices"},
        {"label": "label"},
    ),
    "embed": Task("Embeddings of texts.", {"text": "text"}),
    "openai_batch": Task(
        "Lines of an OpenAI Batch file: chat, completions, embeddings.",
        {"custom_id": "custom_id", "method": "method", "url": "url", "body": "body"},
    ),
}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Raises ValueError naming the option that is out of range."""

    task: str  # of TASKS
    # generate
    max_tokens: int | None = None  # None: to the context's end
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0  # each row draws by it and its id, so a row's answer is the same in any run
    chat: bool = False  # a prompt is a user's message, or a list of messages
    # perplexity
    max_length: int | None = None  # tokens of a window; None: the model's context
    stride: int | None = None  # tokens that each window but the first tells of; None: all it can
    # embed, and the embeddings of openai_batch
    pooling: Pooling = "last"
    normalize: bool = True  # to length 1
    dimensions: int | None = None  # the first so many are kept; None: all
    # openai_batch
    served_model_names: tuple[str, ...] = field(default=())  # none: any name is the model's

    def __post_init__(self):
        def refuse(name: str, what: str):
            raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

        if self.task not in TASKS:
            refuse("task", f"one of {', '.join(TASKS)}")
        for name, least in (("max_tokens", 1), ("max_length", 2), ("stride", 1), ("dimensions", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                refuse(name, f"at least {least}")
        if not 0 <= self.temperature <= 1e4:
            refuse("temperature", "in [0, 10000]")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "in (0, 1]")
        if self.pooling not in POOLINGS:
            refuse("pooling", f"one of {', '.join(POOLINGS)}")
        if self.stride and self.max_length and self.stride >= self.max_length:
            refuse(
                "stride", f"less than max_length={self.max_length}: a window begins with context"
            )
