"""HTTP connections: a bounded number, no idle one keeps a place that a new one needs, and the certificate of each."""

from __future__ import annotations

import ipaddress
import math
import random
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.auth import Certificate

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from starlette.types import Scope
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

# From the connection, or from the first byte of a further request, until its header is whole.
HEADER_S: Final = 10.0
_STATE: Final = "loraplex_certificate"  # of a request's scope
# The kinds of alternative names that gRPC tells of.
_ADDRESS: Final = "IP Address"
_NAMES: Final = ("DNS", "URI", "email", _ADDRESS)
# Share of a connection's age by which it ends earlier or later: connections that began together do not end together.
JITTER: Final = 0.1
_CLOSE: Final = (b"connection", b"close")


class Connections:
    """Every open connection, the one that has been quiet longest first.

    Args:
        max_connections: With as many open, a new one takes the place of the longest quiet one; with none quiet it is closed.
        header_s: How long a request's header may take.
        max_age_s: A request that comes later on its connection is the last there; 0 for never.
    """

    def __init__(self, max_connections: int, *, header_s: float = HEADER_S, max_age_s: float = 0.0) -> None:
        self.header_s = header_s
        self._max_age_s = max_age_s
        self._max_connections = max_connections
        self._open: dict[BoundedProtocol, None] = {}

    @property
    def num_open(self) -> int:
        """Connections that are open."""
        return len(self._open)

    def age_s(self) -> float:
        """Return how old a new connection may become."""
        return self._max_age_s * random.uniform(1 - JITTER, 1 + JITTER) if self._max_age_s else math.inf

    def protocol(self) -> type[BoundedProtocol]:
        """Return the class of these connections' protocols, of which uvicorn makes one each."""
        connections = self

        class Protocol(BoundedProtocol):
            book = connections

        return Protocol

    def opened(self, protocol: BoundedProtocol) -> None:
        """Enter a new connection, at the cost of another one or of itself."""
        if len(self._open) >= self._max_connections:
            quiet = next((known for known in self._open if not known.is_busy), protocol)
            self._open.pop(quiet, None)
            quiet.transport.abort()
            if quiet is protocol:
                return
        self._open[protocol] = None

    def heard(self, protocol: BoundedProtocol) -> None:
        """Note that a connection has said something."""
        if protocol in self._open:
            del self._open[protocol]
            self._open[protocol] = None  # behind all others

    def closed(self, protocol: BoundedProtocol) -> None:
        """Forget a connection."""
        self._open.pop(protocol, None)


class BoundedProtocol(HttpProtocol):
    """uvicorn's HTTP/1.1 with bounds for headers in time and size, kept in the book of `Connections`.

    h11 bounds the size itself (`MAX_HEADER_BYTES`); httptools keeps whatever a client sends, so that bytes which have come
    since the last of a body are counted here. httptools reads on while a request is served: those that came meanwhile
    (pipelining) wait for its answer, and all of them are told when the client is gone.
    """

    book: Connections
    _num_header_bytes = 0
    _header_timer: asyncio.TimerHandle | None = None
    _old_at_s = math.inf

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served; one whose header is not whole yet is none."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first header."""
        super().connection_made(transport)
        self._cycles: deque[RequestResponseCycle] = deque()
        if PlainParser is not None:
            self.parser: PlainParser = PlainParser(self)  # type: ignore[assignment]
        certificate = _certificate(transport.get_extra_info("peercert"))
        if certificate is not None:
            self.app_state = {**self.app_state, _STATE: certificate}
        self.book.opened(self)
        self._old_at_s = self.loop.time() + self.book.age_s()
        self._time_header()

    def data_received(self, data: bytes) -> None:
        """Take data in; a header that has begun must end in time."""
        self.book.heard(self)
        self._num_header_bytes += len(data)
        super().data_received(data)
        if self._num_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("The header of the request is too long.")
        if self.is_busy and self.loop.time() > self._old_at_s:
            self._part()
        self._time_header()

    def on_headers_complete(self) -> None:
        """Serve the request, after those that came before it."""
        self._num_header_bytes = 0
        if self.parser.asks_to_upgrade:
            return
        super().on_headers_complete()
        while self._cycles and self._cycles[0].response_complete:
            self._cycles.popleft()
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Take in a piece of the body."""
        self._num_header_bytes = 0
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


def certificate_of(scope: Scope) -> Certificate | None:
    """Return the names in the certificate that a request's client has shown; None if TLS verified none."""
    certificate = scope.get("state", {}).get(_STATE)
    return certificate if isinstance(certificate, Certificate) else None


def _certificate(peer: Mapping[str, Any] | None) -> Certificate | None:
    """Return the names in what `ssl.SSLSocket.getpeercert` says, as gRPC has them."""
    if not peer:
        return None
    subject = (pair for relative_name in peer.get("subject", ()) for pair in relative_name)
    common_name = next((value for key, value in subject if key == "commonName"), "")
    alternatives = [(kind, name) for kind, name in peer.get("subjectAltName", ()) if kind in _NAMES]
    names = tuple(_shortened(name) if kind == _ADDRESS else name for kind, name in alternatives)
    return Certificate(common_name=common_name, alternative_names=names)


def _shortened(address: str) -> str:
    """Return an address as it is written everywhere else; OpenSSL has ``2001:DB8:0:0:0:0:0:7``."""
    try:
        return str(ipaddress.ip_address(address.strip()))
    except ValueError:
        return address  # of no known length: OpenSSL says so in words, which name no client
