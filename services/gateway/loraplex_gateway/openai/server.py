"""uvicorn as a part of our process: no signal handlers of its own, a bound port before it runs, a bounded stop."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from loraplex_common.tls_files import RotatingServerContext

from loraplex_gateway.openai.connections import Connections
from loraplex_gateway.openai.http_protocol import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from loraplex_common.tls_files import TlsFiles
    from starlette.types import ASGIApp

KEEP_ALIVE_S: Final = 5
# Also what asyncio accepts at one go, and how often it logs at one go if it cannot.
BACKLOG: Final = 256


class _Server(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Leave signals to the process."""
        return nullcontext()


class HttpServer:
    """Serves an ASGI application.

    Args:
        app: The application.
        host: Address to listen on.
        port: 0 picks a free one.
        tls: With a certificate, turns TLS on; new connections are shown what the files hold by then. With an authority,
            clients must show a certificate that it has signed; see `client_certificates.certificate_of`.
        max_connections: As many may be open; see `Connections`.
        shares_port: Whether other processes of this gateway listen on the port too, each with its share of the connections.
        max_connection_age_s: A request that comes later on a connection is its last; 0 for never.

    Attributes:
        connections: Those that are.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        tls: TlsFiles,
        max_connections: int,
        max_connection_age_s: float = 0.0,
        shares_port: bool = False,
    ) -> None:
        self.connections = Connections(max_connections, max_age_s=max_connection_age_s)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http=self.connections.protocol(),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
        )
        if tls.cert is not None:
            config.load()
            config.ssl = RotatingServerContext(tls).context
        self._server = _Server(config)
        self._address, self._shares_port = (host, port), shares_port
        self._socket: socket.socket | None = None
        self._ended = asyncio.Event()
        self._is_running = False

    async def start(self) -> int:
        """Bind and return the port; connections wait until `run`.

        Raises:
            OSError: If the address cannot be bound.
        """
        host, port = self._address
        info = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = info[0]
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._shares_port:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(address)
        self._socket.listen(BACKLOG)
        bound: Any = self._socket.getsockname()
        return int(bound[1])

    async def run(self) -> None:
        """Serve until cancelled; after `stop` nothing is served any more."""
        assert self._socket is not None
        self._is_running = True
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._ended.set()
        await asyncio.Event().wait()  # ends with its supervisor: an early return would be taken for a crash

    async def stop(self, *, grace_s: float) -> None:
        """Accept no more connections and give running responses `grace_s` seconds. Safe to call twice."""
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s)) if grace_s else 1
        if grace_s == 0.0:
            self._server.force_exit = True
        self._server.should_exit = True
        if self._is_running:
            await self._ended.wait()
        if self._socket is not None:
            self._socket.close()
