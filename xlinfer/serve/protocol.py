"""Requests as JSON brings them. Fields and defaults are OpenAI's and vLLM's; null is the default.

Values are bounded where they become `SamplingParams`; what the APIs define beyond these fields is
listed in `fields`.
"""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xlinfer.serve.errors import ServingError


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TruncatingBody(Body):
    """What all that reads a prompt has in common."""

    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)
    request_id: str | None = Field(None, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)


class SamplingBody(TruncatingBody):
    """What completions and chat have in common."""

    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(SamplingBody):
    # Read by `completions.read_prompts`: pydantic's union of four lists takes seconds on long ones.
    prompt: Any = None
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class ChatBody(SamplingBody):
    # Read by `chat_template.check_messages`.
    messages: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


class EmbeddingBody(TruncatingBody):
    # Read by `completions.read_prompts`.
    input: Any = None
    encoding_format: str | None = None  # float or base64
    dimensions: int | None = None
    normalize: bool | None = None  # to length 1, unless false
    add_special_tokens: bool | None = None


class TokenizeBody(Body):
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    tokens: list[int]


def parse_body[T: Body](content_type: str, body: bytes, kind: type[T]) -> T:
    """Raises ServingError 400 that says where the JSON or a field is wrong."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        got = f"got {media_type!r}" if media_type else "it is missing"
        message = f"The Content-Type header must be application/json; {got}."
        raise ServingError(400, message, type="Bad Request")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        message = f"The request body is not valid JSON{where}."
        raise ServingError(400, message, type="Bad Request") from None
    if not isinstance(value, dict):
        raise ServingError(400, "The request body must be a JSON object.", type="Bad Request")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"])
        message = f"{param}: {first['msg']}."
        raise ServingError(400, message, param=param, type="Bad Request") from None
