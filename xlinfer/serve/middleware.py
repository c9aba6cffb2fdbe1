"""What every HTTP request passes before a route sees it, as plain ASGI: its id, the key, limits."""

import asyncio
import hmac
import logging
import re
import uuid
from time import monotonic

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xlinfer.serve.errors import ServingError

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# What orchestrators ask without a key; everything else is guarded, also what does not exist.
OPEN_PATHS = frozenset({"/live", "/ready"})
# Asked every few seconds: not worth a line in the log.
_QUIET_PATHS = OPEN_PATHS | {"/health", "/metrics"}


class RequestId:
    """Names each request, in `x-request-id` (the client's own, if it is sane) and in the log.

    Puts into the scope `xlinfer.request_id` and `xlinfer.headers`, which join the response's.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        headers = {"x-request-id": request_id}
        scope["xlinfer.request_id"], scope["xlinfer.headers"] = request_id, headers
        start, status = monotonic(), 0

        async def named_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(headers)
            await send(message)

        try:
            await self._app(scope, receive, named_send)
        finally:
            if scope["path"] not in _QUIET_PATHS:
                # The raw path is percent-encoded: nobody writes lines into the log through it.
                logger.info(
                    "%s %s %s in %.3f s, id %s",
                    scope["method"],
                    scope.get("raw_path", b"").decode("ascii", "replace"),
                    status or "unanswered",
                    monotonic() - start,
                    request_id,
                )


class ApiKey:
    """401 unless `Authorization: Bearer` holds one of `keys`; no keys: everybody may pass.

    The path is the scope's, never one derived from the Host header. Puts the key that was given
    into the scope as `xlinfer.key`.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]):
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, token = given.partition(" ")
        presented = token.strip().encode("latin-1")
        # Every key is compared, so that the time taken tells nothing.
        known = [hmac.compare_digest(presented, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            message = "An API key is needed: send the header Authorization: Bearer KEY."
            return await ServingError(401, message).response()(scope, receive, send)
        scope["xlinfer.key"] = presented
        await self._app(scope, receive, send)


class BodyLimit:
    """413 for a body above `max_bytes`, announced or not; 408 for one that stalls."""

    def __init__(self, app: ASGIApp, max_bytes: int, read_timeout_s: float):
        self._app, self._max_bytes, self._read_timeout_s = app, max_bytes, read_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced[:20]) > self._max_bytes:
            return await self._too_large().response()(scope, receive, send)
        size, complete = 0, False

        async def limited_receive() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._read_timeout_s)
            except TimeoutError:
                seconds = f"{self._read_timeout_s:.0f} s"
                raise ServingError(
                    408, f"The request body stalled for more than {seconds}."
                ) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if size > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, limited_receive, send)

    def _too_large(self) -> ServingError:
        return ServingError(413, f"The request body must be at most {self._max_bytes} bytes.")
