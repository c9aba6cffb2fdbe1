"""What every route shares: the options, the engine's thread, the metrics, and what it loaded."""

import asyncio
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request

from xlinfer.config import GenerationConfig
from xlinfer.plan import Plan
from xlinfer.request import InvalidRequest, Pooling
from xlinfer.serve.engine_thread import EngineThread
from xlinfer.serve.errors import ServingError
from xlinfer.serve.fields import check_fields, header_value
from xlinfer.serve.metrics import Metrics
from xlinfer.serve.protocol import Body, parse_body
from xlinfer.serve.tokenizer import Tokenizer

LONG_TEXT = 4096  # characters; longer texts are tokenized away from the event loop


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The server's own flags."""

    model_root: str  # what /v1/models calls the model's origin; never a path
    served_model_names: tuple[str, ...]  # the first one is what answers carry
    created: int  # seconds since 1970, as /v1/models says
    api_keys: tuple[str, ...] = ()
    pooling: Pooling = "last"  # of embeddings
    generation_config: str = "auto"  # "none": the API's own defaults
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4 * 2**20
    max_request_bytes: int = 32 * 2**20
    read_timeout_s: float = 60.0
    strict_fields: bool = False


@dataclass(frozen=True, kw_only=True)
class Server:
    options: ServerOptions
    engine: EngineThread
    metrics: Metrics

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.ready.result().tokenizer

    @property
    def plan(self) -> Plan:
        return self.engine.ready.result().engine.plan

    @property
    def max_running(self) -> int:
        return self.engine.ready.result().engine.max_running

    @property
    def vocab_size(self) -> int:
        return self.engine.ready.result().engine.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.engine.ready.result().generation.eos_token_ids

    @property
    def decoder_start(self) -> tuple[int, ...]:
        """What a decoder begins with, whose encoder reads the prompt; empty: there is none."""
        return self.engine.ready.result().generation.decoder_start_token_ids

    @property
    def generation(self) -> GenerationConfig:
        """Defaults for requests that are silent."""
        if self.options.generation_config == "none":
            return GenerationConfig(
                eos_token_ids=self.eos_token_ids, decoder_start_token_ids=self.decoder_start
            )
        return self.engine.ready.result().generation

    def answer_room(self, prompt_tokens: int) -> int:
        """Tokens that the answer to such a prompt may have; below 0 where that is too long."""
        most = self.plan.max_model_len
        if not self.decoder_start or prompt_tokens > most:
            return most - prompt_tokens
        return most - len(self.decoder_start)

    async def read[T: Body](self, request: Request, kind: type[T]) -> T:
        """The request's body, once its fields and its model's name are known to be right.

        Raises ServingError. Fields that no API defines are noted for the response header.
        """
        if (trouble := self.engine.trouble()) is not None:
            self.engine.check_room(0)  # says 500 if the engine is dead
            raise ServingError(503, trouble, retry_after=5)
        body = parse_body(request.headers.get("content-type", ""), await request.body(), kind)
        self.note_ignored(request, check_fields(body, strict=self.options.strict_fields))
        if body.model is not None and body.model not in self.options.served_model_names:
            names = ", ".join(self.options.served_model_names)
            message = f"The model `{body.model}` does not exist. Served here: {names}."
            raise ServingError(404, message, param="model")
        return body

    def note_ignored(self, request: Request, names: list[str]) -> None:
        if names:
            noted = [*request.scope.setdefault("xlinfer.ignored", []), *names]
            request.scope["xlinfer.ignored"] = noted
            headers = request.scope["xlinfer.headers"]
            headers["x-ignored-fields"] = header_value(noted)
            self.metrics.ignored_fields(len(names))

    async def tokenize(
        self, text: str, *, add_special_tokens: bool, param: str, truncate: bool = False
    ) -> list[int]:
        """Token ids of a prompt. A text that cannot fit the context is refused unread, unless it
        is to be truncated. Raises InvalidRequest."""
        most = self.plan.max_model_len
        if len(text) > LONG_TEXT and not truncate:
            least = len(text) // self.tokenizer.max_token_chars
            if least > most:
                raise too_long(most, least, param, at_least=True)
        encode = functools.partial(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens, param=param
        )
        return await off_loop(encode, len(text))

    def cache_salt(self, request: Request, body_salt: str | None) -> str:
        """Prefixes are shared only within one API key, and within a caller's own salt."""
        key = request.scope.get("xlinfer.key", b"")
        if not key and body_salt is None:
            return ""
        return hashlib.sha256(
            hashlib.sha256(key).digest() + (body_salt or "").encode(errors="replace")
        ).hexdigest()


async def off_loop[T](work: Callable[[], T], characters: int) -> T:
    """`work()`, in a thread if it is long enough to be felt by others."""
    return work() if characters <= LONG_TEXT else await asyncio.to_thread(work)


def too_long(most: int, tokens: int, param: str, *, at_least: bool = False) -> InvalidRequest:
    """vLLM's words, which clients look for."""
    contains = f"at least {tokens}" if at_least else f"{tokens}"
    return InvalidRequest(
        param,
        f"This model's maximum context length is {most} tokens. However, your prompt contains "
        f"{contains} input tokens. Please reduce the length of the input.",
    )
