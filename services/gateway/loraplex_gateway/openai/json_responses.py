"""Answers of JSON: small ones at once, a long list piece by piece."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.responses import Response

from loraplex_gateway.requests.stall import StallGuard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

WRITE_BYTES: Final = 128 * 1024


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """Return an answer of one struct."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


class PiecesResponse:
    """Writes pieces as they are, `WRITE_BYTES` or more at a time, and lets other tasks run between two writes.

    Args:
        first: What is written first.
        pieces: The others.
        slow_client_s: Longest time that one write may wait.
    """

    def __init__(self, first: bytes, pieces: Iterator[bytes], *, slow_client_s: float) -> None:
        self._first = first
        self._pieces = pieces
        self._slow_client_s = slow_client_s

    @classmethod
    async def of(cls, pieces: Iterator[bytes], *, slow_client_s: float) -> ASGIApp:
        """Return the answer of some pieces; a short one has its length in the header."""
        first = _next_write(pieces)
        rest = _next_write(pieces)
        if not rest:
            return Response(first, media_type="application/json")
        return cls(first + rest, pieces, slow_client_s=slow_client_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        guard = StallGuard(self._slow_client_s)
        try:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
            )
            data = self._first
            while data:
                guard.writing()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                guard.written()
                await asyncio.sleep(0)
                data = _next_write(self._pieces)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            guard.close()


def _next_write(pieces: Iterator[bytes]) -> bytes:
    """Return the next pieces joined; empty behind the last."""
    parts, num_bytes = [], 0
    for piece in pieces:
        parts.append(piece)
        num_bytes += len(piece)
        if num_bytes >= WRITE_BYTES:
            break
    return b"".join(parts)
