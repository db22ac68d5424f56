"""An HTTP proxy on loopback before one server, which answers as it is told to: busy, cut short, with other credentials."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

_OWN: frozenset[str] = frozenset({"connection", "transfer-encoding", "content-length", "keep-alive"})


@dataclass(frozen=True)
class Said:
    """An answer of the proxy's own."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """The server's answer, of whose body only the first bytes come before the connection ends."""

    after_bytes: int


@dataclass(frozen=True)
class Then:
    """The server's answer, before which something else happens."""

    happens: Callable[[], object]


Fault = Said | Cut | Then | None


@dataclass(frozen=True)
class Seen:
    """A request that has come."""

    method: str
    path: str
    headers: Mapping[str, str]


def s3_error(status: int, code: str) -> Said:
    """Return an answer in the form of object storage."""
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    return Said(status, body.encode(), {"Content-Type": "application/xml"})


class FaultProxy:
    """Passes requests on, but for those that `fault` decides about.

    Attributes:
        fault: Returns what becomes of a request; None passes it on.
        seen: The requests so far.
        num_sent: Bytes of bodies that clients have been sent.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream)
        self.fault: Callable[[Seen], Fault] = lambda _: None
        self.seen: list[Seen] = []
        self.num_sent = 0
        self.url = ""

    def forget(self) -> None:
        """Pass everything on again, and forget what has come."""
        self.fault, self.num_sent = lambda _: None, 0
        self.seen.clear()

    def answer(self, request: Seen, body: bytes) -> tuple[int, dict[str, str], bytes, int]:
        """Return status, headers and body of an answer, and how many of its bytes are sent."""
        self.seen.append(request)
        fault = self.fault(request)
        if isinstance(fault, Said):
            return fault.status, dict(fault.headers), fault.body, len(fault.body)
        status, headers, data = self._passed_on(request, body)
        if isinstance(fault, Then):
            fault.happens()
        return status, headers, data, fault.after_bytes if isinstance(fault, Cut) else len(data)

    def _passed_on(self, request: Seen, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream.netloc, timeout=30)
        try:
            headers = {name: value for name, value in request.headers.items() if name.lower() not in _OWN}
            connection.request(request.method, request.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


@contextmanager
def running_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy before a server inside the block."""
    proxy = FaultProxy(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            request = Seen(self.command, self.path, dict(self.headers))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, data, num_bytes = proxy.answer(request, body)
            length = headers.get("Content-Length", headers.get("content-length", "0"))
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in _OWN:
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
            self.end_headers()
            self.close_connection = num_bytes < len(data)
            with contextlib.suppress(ConnectionError):  # the client may be gone
                self.wfile.write(data[:num_bytes])
            proxy.num_sent += min(num_bytes, len(data))

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _reply  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="fault proxy", daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
