"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}}, code = status.

What went wrong inside is logged here and never told: a client sees its request id.
"""

import json
from collections.abc import Mapping

from starlette.responses import Response

from xlinfer.request import InvalidRequest

# status -> (vLLM's type, whether the same request may succeed later)
KINDS = {
    400: ("BadRequestError", False),
    401: ("AuthenticationError", False),
    404: ("NotFoundError", False),
    405: ("MethodNotAllowedError", False),
    408: ("RequestTimeoutError", True),
    413: ("RequestTooLargeError", False),
    429: ("TooManyRequestsError", True),
    431: ("HeadersTooLargeError", False),
    500: ("InternalServerError", True),
    503: ("ServiceUnavailableError", True),
}


class ServingError(Exception):
    """An answer other than 200. `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        type: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.type, self.retry_after = type or KINDS[status][0], retry_after

    def body(self) -> dict:
        error = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**error, "code": self.status}}

    def response(self) -> Response:
        headers = {}
        if not KINDS[self.status][1]:
            headers["x-should-retry"] = "false"
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return json_response(self.body(), self.status, headers)


def serving_error(error: Exception, request_id: str) -> ServingError:
    """What a client may know of `error`."""
    match error:
        case ServingError():
            return error
        case InvalidRequest():
            return ServingError(400, str(error), param=error.param)
    return ServingError(500, f"The server failed on this request. Request id: {request_id}")


def json_bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        # A model can be made to write half a surrogate pair only by a broken tokenizer.
        errors="replace"
    )


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(json_bytes(value), status, headers, media_type="application/json")
