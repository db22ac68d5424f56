"""One HTTP connection: uvicorn's HTTP/1.1 with bounds for what a client sends before it is answered."""

from __future__ import annotations

import math
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from uvicorn.protocols.http.flow_control import FlowControl

from loraplex_gateway.openai.client_certificates import STATE, read_certificate

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as HttpProtocol
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from loraplex_gateway.openai.upgrades import PlainParser
else:
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as HttpProtocol

        from loraplex_gateway.openai.upgrades import PlainParser
    except ImportError:  # no wheel of httptools for this platform
        from uvicorn.protocols.http.h11_impl import H11Protocol as HttpProtocol

        PlainParser = None

# Most bytes of a request's header, and of what else is no part of its body: trailers, extensions of chunks.
MAX_HEADER_BYTES: Final = 64 * 1024
# Parsed at one go: further requests in so many bytes become objects before the first of them is answered.
SLICE_BYTES: Final = 2 * 1024
# Unparsed bytes of further requests (pipelining) at which a connection is not read on until some are answered.
MAX_HELD_BYTES: Final = 64 * 1024
AS_IT_IS: Final = "send the body as it is: in chunks, or with its Content-Length"
_CLOSE: Final = (b"connection", b"close")
_FINAL: Final = (b"x-should-retry", b"false")


class Book(Protocol):
    """What a connection needs to know of all connections."""

    header_s: float

    def age_s(self) -> float:
        """Return how old a new connection may become."""
        ...

    def opened(self, protocol: BoundedProtocol) -> None:
        """Enter a new connection, at the cost of another one or of itself."""
        ...

    def heard(self, protocol: BoundedProtocol) -> None:
        """Note that a connection has said something."""
        ...

    def closed(self, protocol: BoundedProtocol) -> None:
        """Forget a connection."""
        ...


class _Flow(FlowControl):
    """uvicorn's pauses of a connection, of which one lasts: while too many bytes are held, nothing resumes reading."""

    is_full = False

    def resume_reading(self) -> None:
        """Read on, unless bytes enough are here."""
        if not self.is_full:
            super().resume_reading()

    def hold(self, *, is_full: bool) -> None:
        """Say whether bytes enough are here."""
        was_full, self.is_full = self.is_full, is_full
        if is_full:
            self.pause_reading()
        elif was_full:
            self.resume_reading()


class BoundedProtocol(HttpProtocol):
    """uvicorn's HTTP/1.1 with bounds for headers in time and size, kept in the book of `Connections`.

    h11 bounds the size itself (`MAX_HEADER_BYTES`); httptools keeps whatever a client sends, so that bytes which have come
    since the last of a body are counted here. What comes behind a whole request (pipelining) is held as it is until that
    request is answered: parsed, each such request would be objects of some KB. Those of one slice are parsed with it, wait
    for their answers, and all of them are told when the client is gone.
    """

    book: Book
    _num_header_bytes = 0
    _num_body_bytes = 0
    _refusal: bytes | None = None  # ends the connection once all answers have been sent
    _header_timer: asyncio.TimerHandle | None = None
    _old_at_s = math.inf

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served; one whose header is not whole yet is none."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def num_parsed(self) -> int:
        """Requests that have been parsed and not been answered."""
        return sum(not cycle.response_complete for cycle in self._cycles)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first header."""
        super().connection_made(transport)
        self._cycles: deque[RequestResponseCycle] = deque()
        self._held = bytearray()
        self.flow: _Flow = _Flow(transport)
        if PlainParser is not None:
            self.parser: PlainParser = PlainParser(self)  # type: ignore[assignment]
        certificate = read_certificate(transport.get_extra_info("peercert"))
        if certificate is not None:
            self.app_state = {**self.app_state, STATE: certificate}
        self.book.opened(self)
        self._old_at_s = self.loop.time() + self.book.age_s()
        self._time_header()

    def data_received(self, data: bytes) -> None:
        """Take data in; a header that has begun must end in time."""
        self.book.heard(self)
        if self._refusal is None:
            self._held += data
            self._parse()

    def on_response_complete(self) -> None:
        """Go on with what was held behind the request."""
        super().on_response_complete()
        if self._held:
            self._parse()
        if self._refusal is not None and not self.is_busy:
            self._end(self._refusal)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in OpenAI's form; answers to requests in front of it are sent first."""
        status, text = 400, msg
        for name, value in self.headers or ():
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                status, text = 501, f"Transfer-Encoding {value[:64].decode('latin-1')} is not served; {AS_IT_IS}"
        self._refuse(status, text)

    def _refuse(self, status: int, text: str) -> None:
        error = {"message": text, "type": "invalid_request_error", "param": None, "code": None}
        body = msgspec.json.encode({"error": error})
        own = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), _FINAL, _CLOSE)
        lines = [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *own)]
        phrase = HTTPStatus(status).phrase.encode()
        self._refusal = b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (status, phrase, b"".join(lines), body)
        self._held.clear()
        if not self._is_answering:
            self._end(self._refusal)

    def _end(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()

    def _parse(self) -> None:
        """Parse what is held, slice by slice, up to the end of a request that is to be answered first."""
        while self._held and not self._is_answering and not self.transport.is_closing():
            size = SLICE_BYTES if len(self._held) <= SLICE_BYTES else max(SLICE_BYTES, self._num_body_bytes_left)
            data = bytes(self._held[:size])
            del self._held[:size]
            self._num_header_bytes += len(data)
            super().data_received(data)
            if self._num_header_bytes > MAX_HEADER_BYTES and self._refusal is None:
                self._refuse(431, f"the header of the request is too long: at most {MAX_HEADER_BYTES} bytes are read")
        self.flow.hold(is_full=len(self._held) > MAX_HELD_BYTES)
        if self.is_busy and not self._held and self.loop.time() > self._old_at_s:
            self._part()
        self._time_header()

    @property
    def _is_answering(self) -> bool:
        return self.is_busy and not self.cycle.more_body

    @property
    def _num_body_bytes_left(self) -> int:
        """What is still to come of a body that has said its length: no other request begins in front of its end."""
        if not (self.is_busy and self.cycle.more_body):
            return 0
        announced = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        return announced - self._num_body_bytes

    def on_headers_complete(self) -> None:
        """Serve the request, after those that came before it."""
        self._num_header_bytes = self._num_body_bytes = 0
        if self.parser.asks_to_upgrade:
            return
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take in a piece of the body."""
        self._num_header_bytes = 0
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note the end of the body."""
        self._num_header_bytes = 0
        if self.parser.asks_to_upgrade:
            return
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; uvicorn tells the last request of it alone."""
        self.book.closed(self)
        self._stop_timer()
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        self._cycles.clear()
        self._held.clear()
        super().connection_lost(exc)

    def _part(self) -> None:
        """Say in the answer that it is the last here, and end then: no request crosses the end on its way."""
        self._old_at_s = math.inf
        self.cycle.keep_alive = False
        # uvicorn answers a request that asks for the end with the same header.
        self.scope["headers"] = [*self.scope["headers"], _CLOSE]

    def _time_header(self) -> None:
        if self.is_busy or self.transport.is_closing():
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.book.header_s, self._on_header_late)

    def _on_header_late(self) -> None:
        self._header_timer = None
        if not self.is_busy and not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
