"""POST /v1/chat/completions."""

import functools
from collections.abc import AsyncIterator
from time import monotonic

from fastapi import Request
from starlette.responses import Response

from xlinfer.request import InvalidRequest
from xlinfer.serve.chat_template import check_messages
from xlinfer.serve.errors import json_response
from xlinfer.serve.jobs import EventStream, Job, event, start_job, unless_gone
from xlinfer.serve.params import check_streaming, sampling_params, truncated
from xlinfer.serve.protocol import ChatBody, TokenizeBody
from xlinfer.serve.responses import (
    Identity,
    TokenNames,
    chat_logprobs,
    new_id,
    new_identity,
    prompt_logprobs,
    usage,
)
from xlinfer.serve.server import Server, off_loop
from xlinfer.serve.text import Delta, TextRequest

MAX_TOP_LOGPROBS = 20


async def create_chat_completion(server: Server, request: Request) -> Response:
    body = await server.read(request, ChatBody)
    arrival = monotonic()
    check_streaming(body)
    _check_logprobs(body)
    server.engine.check_room(1)  # before the work of reading; all n are counted afterwards
    prompt, ids = await chat_prompt(
        server, request, body, truncate=body.truncate_prompt_tokens is not None
    )
    if body.max_completion_tokens is not None:
        max_tokens, max_tokens_param = body.max_completion_tokens, "max_completion_tokens"
    else:
        max_tokens, max_tokens_param = body.max_tokens, "max_tokens"
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(
            max_tokens_param, f"{max_tokens_param} must be at least 1, got {max_tokens}."
        )
    ids = truncated(server, ids, body, max_tokens=max_tokens)
    sampling = sampling_params(
        server,
        body,
        prompt_tokens=len(ids),
        prompt_param="messages",
        max_tokens=max_tokens,
        max_tokens_param=max_tokens_param,
        default_max_tokens=server.generation.max_new_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
    )
    text = TextRequest(
        new_id(),
        ids,
        sampling,
        tokenizer=server.tokenizer,
        eos_token_ids=server.eos_token_ids,
        decoder_start=server.decoder_start,
        prompt=prompt,
        priority=body.priority or 0,
        arrival_time=arrival,
        cache_salt=server.cache_salt(request, body.cache_salt),
    )
    identity = new_identity(
        "chatcmpl",
        body.request_id or request.scope["xlinfer.request_id"],
        body.model or server.options.served_model_names[0],
    )
    writer = _Writer(server, body, identity)
    job = await start_job(server.engine, [text], stream=bool(body.stream))
    if body.stream:
        return EventStream(writer.frames(job), close=job.close)
    try:
        await unless_gone(request, job.finished())
    finally:
        job.close()
    return json_response(writer.whole(text))


async def chat_prompt(
    server: Server, request: Request, body: ChatBody | TokenizeBody, *, truncate: bool = False
) -> tuple[str, list[int]]:
    """The rendered conversation and its tokens. Raises InvalidRequest."""
    template = server.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            "messages",
            "The model has no chat template. Start the server with --chat_template, or use "
            "/v1/completions.",
        )
    messages, ignored = check_messages(body.messages)
    if ignored and server.options.strict_fields:
        raise InvalidRequest(ignored[0], f"{ignored[0]}: no served API defines this field.")
    server.note_ignored(request, ignored)
    render = functools.partial(
        template.render,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        kwargs=body.chat_template_kwargs,
    )
    size = sum(len(str(message["content"])) for message in messages)
    prompt = await off_loop(render, size + 64 * len(messages))
    ids = await server.tokenize(
        prompt,
        # A template writes the special tokens itself.
        add_special_tokens=bool(body.add_special_tokens),
        param="messages",
        truncate=truncate,
    )
    if not ids:
        raise InvalidRequest("messages", "The chat template made an empty prompt of the messages.")
    return prompt, ids


def _check_logprobs(body: ChatBody) -> None:
    top = body.top_logprobs
    if top is None:
        return
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}, got {top}."
        raise InvalidRequest("top_logprobs", message)
    if top and not body.logprobs:
        raise InvalidRequest(
            "top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true."
        )


class _Writer:
    """The response, whole or in chunks."""

    def __init__(self, server: Server, body: ChatBody, identity: Identity):
        self._tokenizer, self._body, self._identity = server.tokenizer, body, identity
        self._names = TokenNames(server.tokenizer, bool(body.return_tokens_as_token_ids))

    def whole(self, text: TextRequest) -> dict:
        choices = []
        for answer in text.answers:
            choice = {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            if self._body.return_token_ids:
                choice["token_ids"] = list(answer.token_ids)
            choices.append(choice)
        head = self._identity.head("chat.completion")
        whole = {**head, "choices": choices, "usage": usage([text])}
        if self._body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(text, self._tokenizer)
        if self._body.return_token_ids:
            whole["prompt_token_ids"] = list(text.prompt_token_ids)
        return whole

    async def frames(self, job: Job) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        always = bool(options and options.continuous_usage_stats)
        head, (text,) = self._identity.head("chat.completion.chunk"), job.texts

        def frame(choices: list[dict], with_usage: bool = always, **more) -> bytes:
            chunk = {**head, "choices": choices, **more}
            return event({**chunk, "usage": usage([text])} if with_usage else chunk)

        opened = False
        async for batch in job.deltas():
            frames = []
            if not opened:
                more = {}
                if self._body.return_token_ids:
                    more["prompt_token_ids"] = list(text.prompt_token_ids)
                for answer in text.answers:
                    frames.append(frame([_opening(answer.index)], **more))
                opened = True
            for _, delta in batch:
                if (choice := self._choice(delta)) is not None:
                    frames.append(frame([choice]))
            if frames:
                yield b"".join(frames)
        if options and options.include_usage:
            yield frame([], True)

    def _choice(self, delta: Delta) -> dict | None:
        """None while the text is held back and there is nothing else to say."""
        logprobs = self._logprobs(delta.logprobs)
        told = logprobs is not None or bool(self._body.return_token_ids)
        if not (delta.text or delta.finish_reason or told):
            return None
        choice = {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text or not delta.finish_reason else {},
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _logprobs(self, positions) -> dict | None:
        if not self._body.logprobs or positions is None:
            return None
        return chat_logprobs(positions, self._body.top_logprobs or 0, self._names)


def _opening(index: int) -> dict:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
