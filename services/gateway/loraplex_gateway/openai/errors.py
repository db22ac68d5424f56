"""Our errors as OpenAI's error objects, in the words of the body that was sent."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.errors import InvalidParameterError
from loraplex_common.interceptors import DROP_REASON_KEY
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Sequence

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
# Means of other callers -> those of HTTP's. A call is named by the route that stands for it.
HTTP_MEANS: Final = {
    "`loraplex adapters list`": "GET /v1/models",
    "is still running; resume it, wait": "is still running; wait",
    "loraplex.v1.GatewayService/GetModel": "GET /v1/models/{model}",
    "loraplex.v1.GatewayService/ListModels": "GET /v1/models",
    "loraplex.v1.GatewayService/Generate": "POST /v1/completions and /v1/chat/completions",
    "an adapter goes into the field adapter": "an adapter goes into model: its name, or base|name",
    "loraplex.v1.AdapterStoreService/ImportAdapter": "POST /v1/load_lora_adapter",
    "loraplex.v1.AdapterStoreService/DeleteAdapter": "POST /v1/unload_lora_adapter",
    "LOAD_POLICY_FAIL_FAST": "load_policy fail_fast",
    "LOAD_POLICY_WAIT": "load_policy wait",
}
_CONSTRAINT: Final = "structured_output"
# Names of the core with a dot in them, and those that stand without one in sentences about several fields.
_CORE_NAMES: Final = re.compile(
    rf"\b(?:(?:sampling|stopping|response_options)\.\w+|{_CONSTRAINT}(?:\.\w+)?\b|(?:min|max)_new_tokens|prompt_token_ids)"
)
_RULE_OF_CALLS: Final = re.compile(r"grammar: rule '(?:args_(\d+)|body)': ")
"""How an engine's refusal of a grammar of calls begins: see `chat_output.grammar`."""
_TOOL: Final = re.compile(r"^tools\[(\d+)\]")
# What a name of the core without a dot stands for.
_FULL_NAMES: Final = {name: f"stopping.{name}" for name in ("min_new_tokens", "max_new_tokens")}


class BodyError(InvalidParameterError):
    """A body that cannot be read, for a cause that OpenAI's API has a code for.

    Args:
        message: What is wrong.
        openai_code: The code.
        keywords: The same as for every error.
    """

    def __init__(self, message: str, *, openai_code: str, **keywords: Any) -> None:
        super().__init__(message, **keywords)
        self.openai_code = openai_code


class BodyTooLongError(InvalidParameterError):
    """A body is longer than any that is read."""

    http_status = 413


class ContentEncodingError(InvalidParameterError):
    """A body is compressed: it is not decoded here."""

    http_status = 415


class TransferCodingError(InvalidParameterError):
    """A body is coded for its way in a form that is not understood here."""

    http_status = 501


class BodyNames:
    """How a body calls the fields that the gateway's other parts report errors of.

    Args:
        table: The endpoint's fields.
        body: The body, where one has been read: of two names for one field, the one it uses is told.
        constraint: The body's field that constrains the output, its path included; empty if none does.
        callable_tools: Places among the body's `tools` of those that may be called.
    """

    def __init__(
        self,
        table: Table,
        body: msgspec.Struct | None = None,
        *,
        constraint: str = "",
        callable_tools: Sequence[int] = (),
    ) -> None:
        self._table = table
        self._body = body
        self._constraint = constraint
        self._callable_tools = callable_tools

    def violation(self, field: str, text: str) -> tuple[str, str]:
        """Return a violation in the body's words; what is wrong with a function's schema is told of that function."""
        found = _RULE_OF_CALLS.match(text)
        if found is not None and self._callable_tools and field.partition(".")[0] == _CONSTRAINT:
            if found[1] is None:
                text = f"json_schema: {text[found.end() :]}"
            else:
                field = f"tools[{found[1]}].function.parameters"
                text = f"{field}: {text[found.end() :]}"
        return self.field(field), self.text(text, field)

    def field(self, core: str) -> str:
        """Return the body's name of a field, its index or path kept: ``stop[3]`` for ``stopping.stop_strings[3]``."""
        core = _TOOL.sub(self._place, core)
        root, bracket, rest = core.partition("[")
        if root.partition(".")[0] == _CONSTRAINT:
            return (self._constraint or "response_format") + bracket + rest
        names = [field.name for field in self._table.fields.values() if root in field.core]
        given = [name for name in names if getattr(self._body, name, None) is not None]
        name = next(iter([*given, *names]), root)
        if name == "stop" and isinstance(getattr(self._body, name, None), str):
            return name  # one string has no index
        return name + bracket + rest

    def _place(self, found: re.Match[str]) -> str:
        """Return which of the body's tools one of those that may be called is."""
        number = int(found[1])
        return f"tools[{self._callable_tools[number] if number < len(self._callable_tools) else number}]"

    def text(self, text: str, core: str | None = None) -> str:
        """Return a message in the body's words; `core` is the field that it is about, if it begins with it."""
        if core is not None and text.startswith((f"{core} ", f"{core}:")):
            text = self.field(core) + text.removeprefix(core)
        return _CORE_NAMES.sub(lambda match: self.field(_FULL_NAMES.get(match[0], match[0])), text)


def error_object(error: LoraplexError, names: BodyNames | None = None) -> dict[str, Any]:
    """Return ``{"error": {...}}``: `code` is OpenAI's where it has one, `reason` is ours, `param` the offending field."""
    message, violations = error.message, error.violations
    if names is not None:
        told = [names.violation(field, text) for field, text in violations]
        renamed = message
        for (_, before), (_, after) in zip(violations, told, strict=True):
            renamed = renamed.replace(before, after)
        # Never twice: of another API's paths, what one is called may be another's name.
        message, violations = names.text(message) if renamed == message else renamed, tuple(told)
    for elsewhere, here in HTTP_MEANS.items():
        message = message.replace(elsewhere, here)
    status = error.http_status
    body: dict[str, Any] = {
        "message": message,
        "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": violations[0][0] if violations else None,
        "code": error.openai_code if isinstance(error, BodyError) else CODES.get(error.reason, error.reason),
        "reason": error.reason,
    }
    if len(violations) > 1:
        body["violations"] = [{"field": field, "message": text} for field, text in violations]
    return {"error": body}


def error_headers(error: LoraplexError) -> dict[str, str]:
    """Return the headers of an error's response, with Retry-After where a retry makes sense."""
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
    return headers


def error_response(error: LoraplexError, names: BodyNames | None = None) -> Response:
    """Return the HTTP response of an error."""
    body = msgspec.json.encode(error_object(error, names))
    return Response(body, error.http_status, error_headers(error), media_type="application/json")
