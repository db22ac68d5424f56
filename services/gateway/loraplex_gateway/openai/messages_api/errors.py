"""Our errors as Anthropic's error objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec
from starlette.responses import Response

from loraplex_gateway.openai.errors import error_headers, error_object

if TYPE_CHECKING:
    from loraplex_common.errors import LoraplexError

    from loraplex_gateway.openai.errors import BodyNames

REQUEST_ID: Final = "request-id"
"""The header in which Anthropic's clients look for a request's id."""
TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(status: int, message: str, request_id: str, **more: Any) -> bytes:
    """Return ``{"type": "error", ...}`` as JSON."""
    kind = TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": message, **more}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})


def body_of(failure: LoraplexError, request_id: str, names: BodyNames | None = None) -> bytes:
    """Return the error object of a failure; beside Anthropic's members it has `reason`, `param` and `violations`."""
    told = error_object(failure, names)["error"]
    more = {name: told[name] for name in ("reason", "param", "violations") if told.get(name) is not None}
    return error_body(failure.http_status, told["message"], request_id, **more)


def refusal(failure: LoraplexError, request_id: str, names: BodyNames | None = None) -> Response:
    """Return the HTTP response of a failure."""
    headers = {**error_headers(failure), REQUEST_ID: request_id}
    body = body_of(failure, request_id, names)
    return Response(body, failure.http_status, headers, media_type="application/json")
