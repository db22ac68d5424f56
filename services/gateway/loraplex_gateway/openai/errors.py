"""Our errors as OpenAI's error objects."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
from loraplex_common.interceptors import DROP_REASON_KEY
from starlette.responses import Response

if TYPE_CHECKING:
    from loraplex_common.errors import LoraplexError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    501: "not_supported_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def error_object(error: LoraplexError) -> dict[str, Any]:
    """Return ``{"error": {...}}``; `code` is our stable reason, `param` the offending field."""
    body: dict[str, Any] = {
        "message": error.message,
        "type": _TYPES.get(error.http_status, "server_error"),
        "param": error.field,
        "code": error.reason,
    }
    if len(error.violations) > 1:
        body["violations"] = [{"field": field, "message": text} for field, text in error.violations]
    return {"error": body}


def error_response(error: LoraplexError) -> Response:
    """Return the HTTP response of an error, with Retry-After where a retry makes sense."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after_s * 1000)))
    if error.drop_reason is not None:
        headers[DROP_REASON_KEY] = error.drop_reason
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(msgspec.json.encode(error_object(error)), error.http_status, headers, media_type="application/json")
