"""Builds, runs and drains a gRPC server the same way in every service."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from loraplex_common.descriptors import connections_per_port
from loraplex_common.health import HealthServicer
from loraplex_common.health_names import LIVENESS, READINESS
from loraplex_common.interceptors import LoraplexInterceptor
from loraplex_common.log import get_logger
from loraplex_common.quiet_connections import QuietConnections
from loraplex_common.reflection import enable_reflection
from loraplex_common.rights import RIGHTS
from loraplex_common.tasks import cancel_and_wait
from loraplex_common.tls_files import TlsFiles, server_credentials

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_common.auth import Authenticator, Role
    from loraplex_common.request_arrival import RequestArrivals
    from loraplex_common.rpc_metrics import RpcMetrics

MAX_CONNECTIONS: Final = 8192
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
# With a grace, however short, gRPC closes idle connections in order (GOAWAY with NO_ERROR) before it cuts the others.
GOODBYE_S: Final = 0.1
FOR_EVER_MS: Final = 2**31 - 1

_log = get_logger()

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # W3C's baggage alone may take 8 KiB. From there on gRPC would refuse some calls, by chance, up to 16 KiB, and then all.
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # Our clients ping every 30 s, also between calls; by default gRPC would answer that with too_many_pings.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # A peer whose machine vanished sends no FIN; without these its streams would hold leases for hours.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Calls that arrive in a burst wait for the event loop. gRPC's own limits (1000, 3000) would cancel them at random
    # and without a reason (grpc#34782); ours refuse them with a reason.
    ("grpc.server.max_pending_requests", 30_000),
    ("grpc.server.max_pending_requests_hard_limit", 60_000),
    # A connection without a call, or one that has not even sent its settings, holds a descriptor that others need.
    # Clients reconnect by themselves.
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # While it estimates a link's bandwidth, gRPC lets every stream send megabytes that no reader has asked for. A
    # message that is being read is still asked for by its length.
    ("grpc.http2.bdp_probe", 0),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The address of a server, and how it listens.

    Attributes:
        port: 0 picks a free one.
        tls_cert: Server certificate chain, PEM; with ``tls_key`` turns TLS on.
        tls_client_ca: Authorities that must have signed clients' certificates, PEM; turns mutual TLS on.
        max_connections: Concurrent connections; if unset, as many as descriptors allow.
        max_concurrent_streams: Concurrent calls per connection; unlimited if unset.
        max_connection_age_s: Time, within a tenth, after which a connection takes no further calls; calls under way go
            on for as long as they take. Clients reconnect by themselves and find new servers. 0 for no limit.
        refuses_unknown_fields: Whether requests with fields that our protos do not have are refused. Meant for clients'
            requests; between our own services a newer peer's field is ignored.
        shares_port: Whether other processes of the same service may listen on the port. Two servers on one port are an
            error otherwise: each connection would reach either of them at random.
    """

    host: str = "127.0.0.1"
    port: int = 0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    enable_reflection: bool = False
    max_connections: int | None = None
    max_concurrent_streams: int | None = None
    max_connection_age_s: float = 0.0
    refuses_unknown_fields: bool = False
    shares_port: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.max_connection_age_s < 0:
            raise ValueError(f"max_connection_age_s must not be negative, not {self.max_connection_age_s}")

    @property
    def most_connections(self) -> int:
        """Most concurrent connections."""
        return self.max_connections or connections_per_port(MAX_CONNECTIONS, num_ports=2)

    def options(self) -> list[tuple[str, int]]:
        """Return gRPC's options for this configuration."""
        options = [("grpc.max_allowed_incoming_connections", self.most_connections)]
        options.append(("grpc.so_reuseport", int(self.shares_port)))
        if self.max_concurrent_streams is not None:
            options.append(("grpc.max_concurrent_streams", self.max_concurrent_streams))
        if self.max_connection_age_s:
            age_ms = min(round(1000 * self.max_connection_age_s), FOR_EVER_MS)
            options += [("grpc.max_connection_age_ms", age_ms), ("grpc.max_connection_age_grace_ms", FOR_EVER_MS)]
        return options

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return TLS credentials, or None for plain text. New connections are shown the files' present content.

        Raises:
            OSError: If the files cannot be used.
        """
        if self.tls_cert is None:
            return None
        return server_credentials(TlsFiles(cert=self.tls_cert, key=self.tls_key, ca=self.tls_client_ca))


class GrpcServer:
    """A gRPC server with health, reflection, the error table, authentication, rights and RPC metrics.

    Create it inside a running event loop, add servicers to ``server``, `start`, `set_ready`, and finally `drain`. Its
    owner also runs `Authenticator.follow`, so that calls end when their right to run does.

    Args:
        config: The address, and how it listens.
        authenticator: Decides which callers are let in; None lets every caller in.
        metrics: Is told of calls.
        rights: The calls that each role may make.

    Attributes:
        server: For ``add_XxxServicer_to_server(servicer, grpc_server.server)``.
        health: The table behind the health service.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        authenticator: Authenticator | None = None,
        metrics: RpcMetrics | None = None,
        rights: Mapping[str, frozenset[Role]] = RIGHTS,
        arrivals: RequestArrivals | None = None,
    ) -> None:
        self._config = config
        self._authenticator = authenticator
        self._names: list[str] = []
        self._is_draining = False
        self._credentials: grpc.ServerCredentials | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._calls = LoraplexInterceptor(
            authenticator=authenticator,
            metrics=metrics,
            arrivals=arrivals,
            refuses_unknown_fields=config.refuses_unknown_fields,
            rights=rights,
        )
        self.server = grpc.aio.server(interceptors=[self._calls], options=[*_OPTIONS, *config.options()])
        self.health = HealthServicer()
        self.health.add_to(self.server)

    def add_service_name(self, full_name: str) -> None:
        """Announce a service such as ``loraplex.v1.EngineService`` to health and reflection."""
        self._names.append(full_name)

    async def start(self) -> int:
        """Listen and return the bound port; the server is alive but not ready yet.

        Raises:
            OSError: If the address cannot be bound.
        """
        if self._config.enable_reflection:
            enable_reflection(self.server, self._names)
        address = f"{self._config.host}:{self._config.port}"
        if (
            self._authenticator is not None
            and self._authenticator.names_certificates
            and not self._config.tls_client_ca
        ):
            _log.info("callers need keys here: without --tls-client-ca no certificate in the keys file is asked for")
        # The object is kept: the library asks it for certificates as long as it listens.
        credentials = self._credentials = self._config.credentials()
        try:
            if credentials is None:
                port = self.server.add_insecure_port(address)
            else:
                port = self.server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        self.set_ready(False)
        self.health.set(LIVENESS, is_serving=True)
        await self.server.start()
        keeper = QuietConnections(port, self._config.most_connections, is_busy=self._calls.running.has_any_of)
        self._keeping = asyncio.create_task(keeper.run(), name=f"connections of port {port}")
        return port

    def set_ready(self, ready: bool) -> None:
        """Tell load balancers whether to send work; a draining server stays not ready."""
        for name in ("", READINESS, *self._names):
            self.health.set(name, is_serving=ready and not self._is_draining)

    async def drain(self, *, settle_s: float, grace_s: float) -> None:
        """Go out of service without failing a call.

        It answers NOT_SERVING, serves on for ``settle_s`` seconds until balancers have noticed, then answers new calls
        with DRAINING and gives running ones ``grace_s`` seconds. Liveness stays SERVING, as a draining process must not
        be killed. gRPC's own grace would cancel calls that race with it, and wait for health watches until it is over.
        """
        self._is_draining = True
        self.set_ready(False)
        await asyncio.sleep(settle_s)
        self._calls.running.refuse_new()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._calls.running.wait_until_idle(), grace_s)
        await self.stop(GOODBYE_S)

    async def stop(self, grace_s: float | None = None) -> None:
        """End every call after ``grace_s`` seconds and close all connections; safe to call twice."""
        if self._keeping is not None:
            await cancel_and_wait(self._keeping)
        await self.server.stop(grace_s)
