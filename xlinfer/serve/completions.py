"""POST /v1/completions."""

from collections.abc import AsyncIterator
from time import monotonic

from fastapi import Request
from starlette.responses import Response

from xlinfer.request import InvalidRequest
from xlinfer.serve.errors import json_response
from xlinfer.serve.jobs import EventStream, Job, event, start_job, unless_gone
from xlinfer.serve.params import MAX_SEQUENCES, check_streaming, sampling_params, truncated
from xlinfer.serve.protocol import CompletionBody, EmbeddingBody
from xlinfer.serve.responses import (
    Identity,
    TokenNames,
    completion_logprobs,
    new_id,
    new_identity,
    prompt_logprobs,
    usage,
)
from xlinfer.serve.server import Server, off_loop
from xlinfer.serve.text import Delta, TextRequest, check_token_ids

DEFAULT_MAX_TOKENS = 16


async def create_completion(server: Server, request: Request) -> Response:
    body = await server.read(request, CompletionBody)
    arrival = monotonic()
    check_streaming(body)
    if body.echo and server.decoder_start:
        message = "echo: this model's answer does not go on from the prompt, its encoder's input."
        raise InvalidRequest("echo", message)
    prompts = read_prompts(body.prompt)
    sequences = len(prompts) * max(body.n or 1, 1)
    if sequences > MAX_SEQUENCES:
        message = f"prompts times n must be at most {MAX_SEQUENCES}, got {sequences}."
        raise InvalidRequest("n", message)
    server.engine.check_room(1)  # before the work of reading; all are counted afterwards
    salt = server.cache_salt(request, body.cache_salt)
    texts = []
    for prompt in prompts:
        ids = await prompt_ids(server, body, prompt)
        kept = truncated(server, ids, body, max_tokens=body.max_tokens)
        text = prompt if isinstance(prompt, str) and kept is ids else None
        texts.append(
            TextRequest(
                new_id(),
                kept,
                _sampling(server, body, len(kept)),
                tokenizer=server.tokenizer,
                eos_token_ids=server.eos_token_ids,
                decoder_start=server.decoder_start,
                prompt=text,
                priority=body.priority or 0,
                arrival_time=arrival,
                cache_salt=salt,
            )
        )
    identity = new_identity(
        "cmpl",
        body.request_id or request.scope["xlinfer.request_id"],
        body.model or server.options.served_model_names[0],
    )
    writer = _Writer(server, body, identity)
    if not body.stream:
        job = await start_job(server.engine, texts, stream=False)
        try:
            await unless_gone(request, job.finished())
        finally:
            job.close()
        size = sum(len(text.prompt_token_ids) for text in texts)
        return json_response(await off_loop(lambda: writer.whole(texts), 4 * size))
    job = await start_job(server.engine, texts, stream=True)
    return EventStream(writer.frames(job), close=job.close)


def read_prompts(prompt: object, param: str = "prompt") -> list[str | list[int]]:
    """The prompts of a text, token ids, or a list of either. Raises InvalidRequest naming
    `param`."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int for item in prompt):
            return [prompt]
        if len(prompt) > MAX_SEQUENCES:
            message = f"{param} must hold at most {MAX_SEQUENCES} prompts, got {len(prompt)}."
            raise InvalidRequest(param, message)
        if all(isinstance(item, str) for item in prompt):
            return prompt
        lists: list = [item for item in prompt if isinstance(item, list) and item]
        if len(lists) == len(prompt) and all(type(id) is int for item in lists for id in item):
            return lists
    raise InvalidRequest(
        param,
        f"{param} must be a string, a list of strings, a non-empty list of token ids, or a list of "
        "such lists.",
    )


async def prompt_ids(
    server: Server,
    body: CompletionBody | EmbeddingBody,
    prompt: str | list[int],
    param: str = "prompt",
) -> list[int]:
    """Raises InvalidRequest naming `param`."""
    if isinstance(prompt, list):
        check_token_ids(prompt, server.vocab_size, param)
        return prompt
    ids = await server.tokenize(
        prompt,
        add_special_tokens=body.add_special_tokens is not False,
        param=param,
        truncate=body.truncate_prompt_tokens is not None,
    )
    if not ids:
        raise InvalidRequest(param, f"{param} must not be empty: it has no tokens.")
    return ids


def _sampling(server: Server, body: CompletionBody, prompt_tokens: int):
    score_only = body.echo and body.max_tokens == 0
    if body.max_tokens == 0 and not score_only:
        raise InvalidRequest("max_tokens", "max_tokens must be at least 1, unless echo is true.")
    echoed = body.logprobs if body.echo else None
    scored = echoed if body.prompt_logprobs is None else max(body.prompt_logprobs, echoed or 0)
    return sampling_params(
        server,
        body,
        prompt_tokens=prompt_tokens,
        prompt_param="prompt",
        max_tokens=body.max_tokens,
        max_tokens_param="max_tokens",
        default_max_tokens=server.generation.max_new_tokens or DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        # An answer of no tokens is a score of the prompt.
        prompt_logprobs=0 if score_only and scored is None else scored,
    )


class _Writer:
    """The response, whole or in chunks. Choice index = prompt number * n + answer."""

    def __init__(self, server: Server, body: CompletionBody, identity: Identity):
        self._tokenizer, self._body, self._identity = server.tokenizer, body, identity
        self._names = TokenNames(server.tokenizer, bool(body.return_tokens_as_token_ids))

    def whole(self, texts: list[TextRequest]) -> dict:
        choices = []
        for number, text in enumerate(texts):
            for answer in text.answers:
                delta = Delta(
                    index=answer.index,
                    text=answer.text,
                    token_ids=answer.token_ids,
                    logprobs=answer.logprobs,
                    finish_reason=answer.finish_reason,
                    stop_reason=answer.stop_reason,
                )
                choice, _ = self._choice(number, text, delta, first=True, offset=0)
                if self._body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(text, self._tokenizer)
                choices.append(choice)
        head = self._identity.head("text_completion")
        return {**head, "choices": choices, "usage": usage(texts)}

    async def frames(self, job: Job) -> AsyncIterator[bytes]:
        options = self._body.stream_options
        always = bool(options and options.continuous_usage_stats)
        head, offsets, early = self._identity.head("text_completion"), {}, []
        # The prompt's logprobs come with answer 0; the other answers' echoes wait for them.
        scored = self._body.echo and self._body.logprobs is not None
        async for batch in job.deltas():
            frames, batch, early = [], early + batch, []
            for number, delta in batch:
                if scored and job.texts[number].prompt_logprobs is None:
                    early.append((number, delta))
                    continue
                text, place = job.texts[number], (number, delta.index)
                first = place not in offsets
                choice, offsets[place] = self._choice(
                    number, text, delta, first=first, offset=offsets.get(place, 0)
                )
                if not self._worth_sending(choice):
                    continue
                chunk = {**head, "choices": [choice]}
                frames.append(event({**chunk, "usage": usage(job.texts)} if always else chunk))
            if frames:
                yield b"".join(frames)
        if options and options.include_usage:
            yield event({**head, "choices": [], "usage": usage(job.texts)})

    def _worth_sending(self, choice: dict) -> bool:
        """A chunk whose text is still held back says nothing, unless it carries tokens."""
        tokens = choice["logprobs"] is not None or "token_ids" in choice
        return bool(choice["text"] or choice["finish_reason"] or tokens)

    def _choice(
        self, number: int, text: TextRequest, delta: Delta, *, first: bool, offset: int
    ) -> tuple[dict, int]:
        """(the choice, the text offset after it)."""
        body = self._body
        echo = bool(body.echo) and first
        said, ids, positions = delta.text, list(delta.token_ids), list(delta.logprobs or ())
        if echo:
            prompt = text.prompt
            if prompt is None:
                prompt = self._tokenizer.decode(text.prompt_token_ids, skip_special_tokens=False)
            said = prompt + said
        logprobs = None
        if body.logprobs is not None:
            if echo:
                ids = [*text.prompt_token_ids, *ids]
                positions = [*(text.prompt_logprobs or ()), *positions]
            logprobs, offset = completion_logprobs(
                ids, positions, body.logprobs, self._names, offset
            )
        choice = {
            "index": number * text.sampling.n + delta.index,
            "text": said,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            if first:
                choice["prompt_token_ids"] = list(text.prompt_token_ids)
        return choice, offset
