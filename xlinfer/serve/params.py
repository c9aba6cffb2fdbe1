"""A request's fields as `SamplingParams`, checked against the context and the plan."""

from xlinfer.request import InvalidRequest, SamplingParams
from xlinfer.serve.protocol import SamplingBody, TruncatingBody
from xlinfer.serve.server import Server, too_long

MAX_SEQUENCES = 1024  # of one HTTP request: prompts times n

# Fields that pass unchanged, and generation_config's that stand in for a silent request.
_PLAIN = (
    *("n", "presence_penalty", "frequency_penalty", "seed", "stop", "stop_token_ids"),
    *("bad_words", "include_stop_str_in_output", "ignore_eos", "min_tokens", "logit_bias"),
    *("allowed_token_ids", "skip_special_tokens", "spaces_between_special_tokens"),
)
_FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_params(
    server: Server,
    body: SamplingBody,
    *,
    prompt_tokens: int,
    prompt_param: str,
    max_tokens: int | None,
    max_tokens_param: str,
    default_max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Raises InvalidRequest. `max_tokens` is what the client asked for; if it is None, the
    default applies as far as the context allows (a default of None: all that it allows)."""
    most, room = server.plan.max_model_len, server.answer_room(prompt_tokens)
    if room < (0 if max_tokens == 0 else 1):
        raise too_long(most, prompt_tokens, prompt_param)
    if max_tokens is None:
        max_tokens = room if default_max_tokens is None else min(default_max_tokens, room)
    elif max_tokens > room and server.decoder_start:
        raise InvalidRequest(
            max_tokens_param,
            f"This model's answers have at most {room} tokens, whatever the prompt. However, you "
            f"requested {max_tokens} output tokens. Please reduce the number of requested tokens.",
        )
    elif max_tokens > room:
        raise InvalidRequest(
            max_tokens_param,
            f"This model's maximum context length is {most} tokens. However, you requested "
            f"{max_tokens} output tokens and your prompt contains {prompt_tokens} input tokens, "
            f"for a total of {max_tokens + prompt_tokens} tokens. Please reduce the length of the "
            "input prompt or the number of requested output tokens.",
        )
    values = {name: getattr(body, name) for name in _PLAIN}
    for name in _FROM_GENERATION_CONFIG:
        asked = getattr(body, name)
        values[name] = getattr(server.generation, name) if asked is None else asked
    values |= {"max_tokens": max_tokens}
    values |= {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    if prompt_logprobs is not None and server.decoder_start:
        message = "prompt_logprobs: the prompt is what this model's encoder reads; it has none."
        raise InvalidRequest("prompt_logprobs", message)
    for name, asked in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        count = server.vocab_size if asked == -1 else asked
        if count is not None and count > (allowed := server.plan.max_logprobs):
            message = f"Requested {name} of {asked}, which is greater than max allowed: {allowed}."
            raise InvalidRequest(name, message)
    return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def check_streaming(body: SamplingBody) -> None:
    """Raises InvalidRequest for combinations that vLLM refuses as well."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "stream_options", "Stream options can only be defined when `stream=True`."
        )
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs", "`prompt_logprobs` are not available when `stream=True`."
        )


def truncated(
    server: Server, ids: list[int], body: TruncatingBody, *, max_tokens: int | None
) -> list[int]:
    """The prompt cut to `truncate_prompt_tokens` (-1: what the context holds beside max_tokens),
    keeping its end unless `truncation_side` is "right". Raises InvalidRequest."""
    if body.truncation_side not in (None, "left", "right"):
        raise InvalidRequest(
            "truncation_side",
            f"truncation_side must be 'left' or 'right', got {body.truncation_side!r}.",
        )
    keep, max_model_len = body.truncate_prompt_tokens, server.plan.max_model_len
    if keep is None:
        return ids
    if keep == -1:
        # What an encoder reads takes no place of the answer's.
        keep = max_model_len if server.decoder_start else max(1, max_model_len - (max_tokens or 1))
    if not 1 <= keep <= max_model_len:
        raise InvalidRequest(
            "truncate_prompt_tokens",
            f"truncate_prompt_tokens must be -1 or from 1 to {max_model_len}, got {keep}.",
        )
    return ids[:keep] if body.truncation_side == "right" else ids[-keep:]
