"""The caller's trace id: taken from a header, logged, and given back with every response. Never a request's identity.

A service mesh hands one x-request-id on to all the calls that one user action causes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.ids import new_request_id

from loraplex_gateway.openai.direct import end_if_unasked, offer_direct, unframed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = b"x-request-id"
# What may go back into a header and into logs as it came.
_TRACE_ID: Final = re.compile(rb"[!-~]{1,256}")
_TRACEPARENT: Final = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_KEY: Final = "loraplex.origin"
_HEADERS: Final = "loraplex.headers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """How a request is known to its caller and to us.

    Attributes:
        trace_id: The caller's x-request-id; without one, the request id.
        request_id: Drawn here, so that no other request has it.
        traceparent: W3C trace context, as the caller sent it; empty without.
    """

    trace_id: str
    request_id: str
    traceparent: str = ""


class TraceIds:
    """ASGI middleware that finds the `Origin` of each request and puts its trace id into the response's headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_KEY] = origin = _origin(scope)
        offer_direct(scope, send)
        client = send
        if scope["http_version"] == "1.0":
            send = unframed(send)

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                end_if_unasked(client)
                added = ((HEADER, origin.trace_id.encode("ascii")), *scope.get(_HEADERS, ()))
                headers = [*message.get("headers", ()), *added]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_traced)


def add_headers(scope: Scope, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Have `TraceIds` write further headers into the answer to a request that has not reached it yet."""
    scope[_HEADERS] = (*scope.get(_HEADERS, ()), *headers)


def origin_of(scope: Scope) -> Origin:
    """Return what `TraceIds` found."""
    origin = scope[_KEY]
    assert isinstance(origin, Origin)
    return origin


def _origin(scope: Scope) -> Origin:
    request_id = new_request_id()
    return Origin(
        trace_id=_header(scope, HEADER, _TRACE_ID) or request_id,
        request_id=request_id,
        traceparent=_header(scope, b"traceparent", _TRACEPARENT),
    )


def _header(scope: Scope, name: bytes, pattern: re.Pattern[bytes]) -> str:
    """Return a header if it is of the form; proxies put all sorts of things into it."""
    value = next((value for key, value in scope["headers"] if key == name), b"")
    return value.decode("ascii") if pattern.fullmatch(value) else ""
