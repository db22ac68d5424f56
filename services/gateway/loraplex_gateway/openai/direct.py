"""Writes chunks of a response straight to its connection: nothing is awaited, no layer of the application is passed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Scope, Send
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
else:
    try:
        from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    except ImportError:  # no wheel of httptools: all chunks go through the application

        class RequestResponseCycle:
            """Stands for a class that no object is of."""


_KEY = "loraplex.direct"


class DirectWriter:
    """Writes to the client of one request whose response has begun.

    Args:
        cycle: uvicorn's state of request and response.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_ready(self) -> bool:
        """Whether a chunk can be written now: the client is there, and has room for it."""
        cycle = self._cycle
        return (
            cycle.chunked_encoding is True
            and not cycle.flow.write_paused
            and not cycle.disconnected
            and not cycle.response_complete
            and not cycle.transport.is_closing()
        )

    def write(self, data: bytes) -> None:
        """Write a chunk of the body, not empty."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def offer_direct(scope: Scope, send: Send) -> None:
    """Keep what a server calls `send`, before other layers wrap it, for `direct_writer`."""
    cycle = getattr(send, "__self__", None)
    if isinstance(cycle, RequestResponseCycle):
        scope[_KEY] = DirectWriter(cycle)


def direct_writer(scope: Scope) -> DirectWriter | None:
    """Return the writer of a request; None where its server has none."""
    writer = scope.get(_KEY)
    return writer if isinstance(writer, DirectWriter) else None


def end_if_unasked(send: Send) -> None:
    """Let a connection end with an answer to a client that still waits to hear whether to send its body (``Expect``).

    It may send the body or not, so where its next request would begin is not known. h11 does this by itself.
    """
    cycle = getattr(send, "__self__", None)
    if isinstance(cycle, RequestResponseCycle) and cycle.waiting_for_100_continue:
        cycle.keep_alive = False


def unframed(send: Send) -> Send:
    """Return a `send` for a client of HTTP/1.0, which knows no chunks: an answer without a length ends with its connection.

    h11 does this by itself.
    """
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        return send
    has_length = True

    async def send_unframed(message: Message) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_unframed
