"""The routes, as one table, and the application around them."""

import logging
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from xlinfer.serve.admin import (
    detokenize,
    live,
    metrics,
    ready,
    tokenize,
    tokenizer_info,
    version,
)
from xlinfer.serve.chat import create_chat_completion
from xlinfer.serve.completions import create_completion
from xlinfer.serve.embeddings import create_embedding
from xlinfer.serve.errors import KINDS, ServingError, serving_error
from xlinfer.serve.jobs import ClientGone
from xlinfer.serve.middleware import ApiKey, BodyLimit, RequestId
from xlinfer.serve.openai import get_model, list_models
from xlinfer.serve.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)
from xlinfer.serve.server import Server

logger = logging.getLogger(__name__)

Handler = Callable[[Server, Request], Awaitable[Response]]

ROUTES: tuple[tuple[str, str, Handler, type[Body] | None], ...] = (
    ("POST", "/v1/completions", create_completion, CompletionBody),
    ("POST", "/v1/chat/completions", create_chat_completion, ChatBody),
    ("POST", "/v1/embeddings", create_embedding, EmbeddingBody),
    ("GET", "/v1/models", list_models, None),
    ("GET", "/v1/models/{model:path}", get_model, None),
    ("POST", "/tokenize", tokenize, TokenizeBody),
    ("POST", "/detokenize", detokenize, DetokenizeBody),
    ("GET", "/tokenizer_info", tokenizer_info, None),
    ("GET", "/live", live, None),
    ("GET", "/ready", ready, None),
    ("GET", "/health", ready, None),
    ("GET", "/version", version, None),
    ("GET", "/metrics", metrics, None),
)


def create_app(server: Server) -> FastAPI:
    # The documentation pages would load scripts from elsewhere; /openapi.json is enough.
    app = FastAPI(title="xlinfer", docs_url=None, redoc_url=None)
    for method, path, handler, body in ROUTES:
        app.add_api_route(
            path,
            _endpoint(server, handler),
            methods=[method],
            operation_id=handler.__name__ + path.replace("/", "_"),
            summary=(handler.__doc__ or path).split("\n")[0],
            openapi_extra=_openapi(body),
        )
    app.add_exception_handler(HTTPException, _no_route)
    options = server.options
    # The last one added is the first one passed.
    app.add_middleware(
        BodyLimit, max_bytes=options.max_request_bytes, read_timeout_s=options.read_timeout_s
    )
    app.add_middleware(ApiKey, keys=options.api_keys)
    app.add_middleware(RequestId)
    return app


def _endpoint(server: Server, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(server, request)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it; the log does
        except Exception as error:
            request_id = request.scope["xlinfer.request_id"]
            known = serving_error(error, request_id)
            if known is not error and known.status == 500:
                logger.exception("request %s failed", request_id)
            return known.response()

    return endpoint


def _openapi(body: type[Body] | None) -> dict | None:
    if body is None:
        return None
    schema = body.model_json_schema()
    # References are into the whole document, where this schema's definitions are not.
    definitions = schema.pop("$defs", {})
    for field in schema["properties"].values():
        for option in field.get("anyOf", ()):
            if reference := option.pop("$ref", None):
                option |= definitions[reference.rpartition("/")[2]]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status not in KINDS:
        status = 400
    message = f"{request.method} is not served at this path."
    return ServingError(status, message).response()
