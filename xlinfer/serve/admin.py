"""Routes beside the answers: is it alive, what is it, what do its tokens look like."""

import importlib.metadata

from fastapi import Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from xlinfer.request import InvalidRequest
from xlinfer.serve.chat import chat_prompt
from xlinfer.serve.errors import ServingError, json_response
from xlinfer.serve.protocol import DetokenizeBody, TokenizeBody
from xlinfer.serve.server import Server, off_loop
from xlinfer.serve.text import check_token_ids

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


async def live(server: Server, request: Request) -> Response:
    """200 while the process answers."""
    return Response()


async def ready(server: Server, request: Request) -> Response:
    """200 when new work is served; 503 while loading, draining, hung or dead."""
    if (trouble := server.engine.trouble()) is not None:
        raise ServingError(503, trouble, retry_after=5)
    return Response()


async def version(server: Server, request: Request) -> Response:
    return json_response({"version": importlib.metadata.version("xlinfer")})


async def metrics(server: Server, request: Request) -> Response:
    return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def tokenize(server: Server, request: Request) -> Response:
    """Token ids of a `prompt`, or of the prompt that the chat template makes of `messages`."""
    body = await server.read(request, TokenizeBody)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt", "Give either prompt or messages.")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        ids = await off_loop(
            lambda: server.tokenizer.encode(body.prompt or "", add_special_tokens=special),
            len(body.prompt),
        )
    else:
        _, ids = await chat_prompt(server, request, body, truncate=True)
    strings = server.tokenizer.token_strings(ids) if body.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": server.plan.max_model_len, "tokens": ids}
    return json_response({**answer, "token_strs": strings})


async def tokenizer_info(server: Server, request: Request) -> Response:
    """What a client needs to write prompts itself: special tokens and the chat template."""
    template = server.tokenizer.chat_template
    return json_response(
        {
            **{name: server.tokenizer.special_tokens.get(name) for name in _SPECIAL},
            "chat_template": None if template is None else template.source,
            "model_max_length": server.plan.max_model_len,
        }
    )


async def detokenize(server: Server, request: Request) -> Response:
    body = await server.read(request, DetokenizeBody)
    check_token_ids(body.tokens, server.vocab_size, "tokens")
    text = await off_loop(
        lambda: server.tokenizer.decode(body.tokens, skip_special_tokens=False), len(body.tokens)
    )
    return json_response({"prompt": text})
