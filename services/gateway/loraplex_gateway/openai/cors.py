"""Lets web pages of chosen origins read answers (CORS); off unless `--cors-allow-origin` names one.

The headers are part of the answer's first message, so a streamed chunk costs nothing. Pages send their key in
`Authorization` by themselves; cookies and certificates, which a browser would add unasked, are not taken from them.

Source: WHATWG, "Fetch", section 3.2, "HTTP CORS protocol".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from loraplex_gateway.config import ANY_ORIGIN
from loraplex_gateway.openai.tracing import add_headers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Receive, Scope, Send

_HEADER_NAMES: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}(, ?[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}){0,63}")
# How long a browser may remember the answer to its question, in seconds.
MAX_AGE: Final = b"600"


class Cors:
    """ASGI middleware that answers browsers' questions and marks answers as readable.

    Args:
        app: The application; it must be a `TraceIds`, which writes the headers.
        origins: Allowed origins; `ANY_ORIGIN` allows all.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = frozenset(origin.encode() for origin in origins)
        self._allows_any = ANY_ORIGIN.encode() in self._origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer the question that comes before one."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = dict(scope["headers"])
        origin: bytes | None = asked.get(b"origin")
        if origin is not None and (self._allows_any or origin in self._origins):
            headers = [(b"access-control-allow-origin", b"*" if self._allows_any else origin), (b"vary", b"Origin")]
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in asked:
                await _answer(asked.get(b"access-control-request-headers", b""), headers, send)
                return
            add_headers(scope, (*headers, (b"access-control-expose-headers", b"*")))
        await self._app(scope, receive, send)


async def _answer(names: bytes, headers: list[tuple[bytes, bytes]], send: Send) -> None:
    """Say that a page may send a request with headers of these names."""
    headers += [(b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", MAX_AGE)]
    if _HEADER_NAMES.fullmatch(names):
        headers.append((b"access-control-allow-headers", names))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
