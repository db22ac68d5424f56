"""Our errors as OpenAI's error objects, in the words of the body that was sent."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.interceptors import DROP_REASON_KEY
from starlette.responses import Response

if TYPE_CHECKING:
    from loraplex_common.errors import LoraplexError

    from loraplex_gateway.openai.fields import Table

# OpenAI's clients look at the status first; these are the types that its API sends with it.
TYPES: Final = {409: "conflict_error", 429: "rate_limit_error", 499: "client_closed_request"}
# Reasons that OpenAI's API has a code of its own for, at which clients branch. docs/errors.md has the same table.
CODES: Final = {
    "CONTEXT_LENGTH_EXCEEDED": "context_length_exceeded",
    "INVALID_PARAMETER": "invalid_value",
    "ADAPTER_NOT_FOUND": "model_not_found",
    "MODEL_NOT_FOUND": "model_not_found",
    "UNAUTHENTICATED": "invalid_api_key",
    "TENANT_QUOTA": "rate_limit_exceeded",
    "SATURATED": "rate_limit_exceeded",
    "QUEUE_TTL": "rate_limit_exceeded",
    "SLO_UNREACHABLE": "rate_limit_exceeded",
}
# What other callers do to see the names that there are -> what HTTP's do.
HTTP_MEANS: Final = {"`loraplex adapters list`": "GET /v1/models"}
_DOTTED: Final = re.compile(r"\b(?:sampling|stopping|response_options)\.\w+")


class BodyNames:
    """How a body calls the fields that the gateway's other parts report errors of.

    Args:
        table: The endpoint's fields.
        body: The body, where one has been read: of two names for one field, the one it uses is told.
    """

    def __init__(self, table: Table, body: msgspec.Struct | None = None) -> None:
        self._table = table
        self._body = body

    def field(self, core: str) -> str:
        """Return the body's name of a field, its index or path kept: ``stop[3]`` for ``stopping.stop_strings[3]``."""
        root, bracket, rest = core.partition("[")
        names = [field.name for field in self._table.fields.values() if root in field.core]
        given = [name for name in names if getattr(self._body, name, None) is not None]
        name = next(iter([*given, *names]), root)
        if name == "stop" and isinstance(getattr(self._body, name, None), str):
            return name  # one string has no index
        return name + bracket + rest

    def text(self, text: str, core: str | None = None) -> str:
        """Return a message in the body's words; `core` is the field that it is about, if it begins with it."""
        if core is not None and text.startswith(f"{core} "):
            text = self.field(core) + text.removeprefix(core)
        for elsewhere, here in HTTP_MEANS.items():
            text = text.replace(elsewhere, here)
        return _DOTTED.sub(lambda match: self.field(match[0]), text)


def error_object(error: LoraplexError, names: BodyNames | None = None) -> dict[str, Any]:
    """Return ``{"error": {...}}``: `code` is OpenAI's where it has one, `reason` is ours, `param` the offending field."""
    message, violations = error.message, error.violations
    if names is not None:
        told = [(names.field(field), names.text(text, field)) for field, text in violations]
        for (_, before), (_, after) in zip(violations, told, strict=True):
            message = message.replace(before, after)
        message, violations = names.text(message), tuple(told)
    status = error.http_status
    body: dict[str, Any] = {
        "message": message,
        "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": violations[0][0] if violations else None,
        "code": CODES.get(error.reason, error.reason),
        "reason": error.reason,
    }
    if len(violations) > 1:
        body["violations"] = [{"field": field, "message": text} for field, text in violations]
    return {"error": body}


def error_response(error: LoraplexError, names: BodyNames | None = None) -> Response:
    """Return the HTTP response of an error, with Retry-After where a retry makes sense."""
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(error.retry_after_s * 1000)))
    if not error.is_retryable:
        headers["x-should-retry"] = "false"  # OpenAI's clients would go by the status alone
    if error.drop_reason is not None:
        headers[DROP_REASON_KEY] = error.drop_reason
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    body = msgspec.json.encode(error_object(error, names))
    return Response(body, error.http_status, headers, media_type="application/json")
