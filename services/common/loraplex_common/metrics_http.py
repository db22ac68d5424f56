"""Serves GET /metrics and GET /healthz beside a gRPC server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import UnauthenticatedError
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from loraplex_common.exposition import Exposition, Page

MAX_CONNECTIONS: Final = 64
RENDER_TIMEOUT_S: Final = 5.0
PLAIN_TEXT: Final = "text/plain; charset=utf-8"
STOP_POLL_S: Final = 0.1  # seconds between the thread's checks whether to stop

_log = get_logger()


async def _turn() -> None:
    """Return once the event loop has come round."""
    await asyncio.sleep(0)


class MetricsServer:
    """A small HTTP server for scrapers and probes.

    A thread parses HTTP, but metrics are collected on the event loop that called `start`: collectors read the service's
    state without locks, and a loop that hangs fails its health check.

    Args:
        exposition: Content of /metrics.
        port: 0 picks a free one.
        pulse: Awaited by /healthz; a `TimeoutError` means that the service hangs.
    """

    def __init__(
        self,
        exposition: Exposition,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        pulse: Callable[[], Coroutine[None, None, None]] = _turn,
    ) -> None:
        self._exposition = exposition
        self._pulse = pulse
        self._address = (host, port)
        self._http: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> int:
        """Listen and return the bound port.

        Raises:
            OSError: If the address cannot be bound.
        """
        loop = asyncio.get_running_loop()

        def render(accept: str, authorization: str | None) -> Page:
            call = asyncio.run_coroutine_threadsafe(_on_loop(self._exposition, accept, authorization), loop)
            return call.result(RENDER_TIMEOUT_S)

        def beat() -> None:
            asyncio.run_coroutine_threadsafe(self._pulse(), loop).result(RENDER_TIMEOUT_S)

        class Handler(_Handler):
            page = staticmethod(render)
            pulse = staticmethod(beat)

        self._http = _Server(self._address, Handler)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": STOP_POLL_S}, name="metrics-http", daemon=True
        )
        self._thread.start()
        return int(self._http.server_address[1])

    async def stop(self) -> None:
        """Stop listening; safe to call twice."""
        http, thread = self._http, self._thread
        self._http = self._thread = None
        if http is not None and thread is not None:
            await asyncio.to_thread(http.shutdown)
            await asyncio.to_thread(thread.join)
            http.server_close()


async def _on_loop(exposition: Exposition, accept: str, authorization: str | None) -> Page:
    if exposition.refresh is not None:
        await exposition.refresh()
    return exposition.render(accept=accept, authorization=authorization)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A second process on the same port is an error, unlike in the base class.
    allow_reuse_port = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._open: dict[Any, None] = {}  # oldest first
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; if `MAX_CONNECTIONS` are open, the oldest, which only waits, is closed."""
        with self._lock:
            oldest = next(iter(self._open)) if len(self._open) >= MAX_CONNECTIONS else None
            self._open.pop(oldest, None)
            self._open[request] = None
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread then reads the end and closes it
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore scrapers that went away, and log every other error."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.warning("a request for metrics failed", exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    """Answers the two paths; `page` and `pulse` are set per server."""

    timeout = 10  # seconds for a client to send its request
    page: Any
    pulse: Any

    def do_GET(self) -> None:
        try:
            self._answer(self.path.partition("?")[0])
        except concurrent.futures.TimeoutError:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "the event loop does not answer")
        except UnauthenticatedError as error:
            body = f"{error.message}\n".encode()
            self._send(HTTPStatus.UNAUTHORIZED, body, PLAIN_TEXT, {"WWW-Authenticate": "Bearer"})

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a scrape every few seconds is not worth a line."""

    def _answer(self, path: str) -> None:
        if path == "/metrics":
            page = self.page(",".join(self.headers.get_all("Accept", [])), self.headers.get("Authorization"))
            self._send(HTTPStatus.OK, page.body, page.content_type)
        elif path == "/healthz":
            self.pulse()
            self._send(HTTPStatus.OK, b"ok\n", PLAIN_TEXT)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(
        self, status: HTTPStatus, body: bytes, content_type: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
