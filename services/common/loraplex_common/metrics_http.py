"""Serves GET /metrics (Prometheus text) and GET /healthz beside a gRPC server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.exposition import choose_encoder

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

RENDER_TIMEOUT_S: Final = 5.0
STOP_POLL_S: Final = 0.1  # how often the thread looks whether it should stop


class MetricsServer:
    """A small HTTP server for scrapers and probes.

    HTTP is parsed in a thread, but metrics are collected on the event loop that called `start`: collectors read the
    service's state without locks, and a loop that hangs fails its health check.

    Args:
        registry: What /metrics shows.
        port: 0 picks a free one.
    """

    def __init__(self, registry: CollectorRegistry, host: str = "127.0.0.1", port: int = 0) -> None:
        self._registry = registry
        self._address = (host, port)
        self._http: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> int:
        """Listen and return the bound port.

        Raises:
            OSError: If the address cannot be bound.
        """
        loop = asyncio.get_running_loop()

        def render(accept: str) -> tuple[bytes, str]:
            encode, content_type = choose_encoder(accept)
            call = asyncio.run_coroutine_threadsafe(_on_loop(encode, self._registry), loop)
            return call.result(RENDER_TIMEOUT_S), content_type

        class Handler(_Handler):
            page = staticmethod(render)

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


async def _on_loop(encode: Any, registry: CollectorRegistry) -> bytes:
    data: bytes = encode(registry)
    return data


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Unlike the base class: a second process on the same port is an error.
    allow_reuse_port = False


class _Handler(BaseHTTPRequestHandler):
    """Answers the two paths; `page` is set per server."""

    timeout = 10  # seconds for a client to send its request
    page: Any

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path not in ("/metrics", "/healthz"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            body, content_type = self.page(self.headers.get("Accept", ""))
        except concurrent.futures.TimeoutError:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "the event loop does not answer")
            return
        if path == "/healthz":
            body, content_type = b"ok\n", "text/plain; charset=utf-8"
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape every few seconds is no news."""
