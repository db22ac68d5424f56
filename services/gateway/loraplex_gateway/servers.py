"""The gateway's three ports, gRPC, HTTP and /metrics, and its ways to engines and store, as its configuration has them."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

from loraplex.keda import externalscaler_pb2_grpc
from loraplex.v1 import fleet_pb2_grpc, gateway_pb2_grpc
from loraplex_common.descriptors import connections_per_port
from loraplex_common.exposition import Audience, Exposition
from loraplex_common.grpc_server import GrpcServer
from loraplex_common.metrics_http import MetricsServer
from loraplex_common.peers import PeerChannel
from loraplex_common.rpc_metrics import RpcMetrics
from loraplex_common.tasks import cancel_and_wait
from loraplex_common.tls_files import TlsFiles
from loraplex_common.vllm_metrics import FLEET_LABEL

from loraplex_gateway.engines.pool import EnginePool, LinkOptions
from loraplex_gateway.openai.server import HttpServer
from loraplex_gateway.workers.control import ControlServer, cancel_at_sibling

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc
    from loraplex_common.auth import Authenticator
    from loraplex_common.peers import Peers
    from prometheus_client import CollectorRegistry
    from starlette.types import ASGIApp

    from loraplex_gateway.config import GatewayConfig
    from loraplex_gateway.grpc.servicer import GatewayServicer
    from loraplex_gateway.grpc.servicer_fleet import FleetServicer
    from loraplex_gateway.grpc.servicer_scaler import ScalerServicer
    from loraplex_gateway.metrics.gateway import GatewayMetrics
    from loraplex_gateway.requests.admission import AdmissionController
    from loraplex_gateway.requests.claims import RequestClaims
    from loraplex_gateway.requests.core import GatewayCore
    from loraplex_gateway.text.models import ModelCatalog
    from loraplex_gateway.workers.setup import WorkerSetup

# Per connection. A call beyond them waits at its client without a word, so saturation must be told long before.
MAX_STREAMS: Final = 16_384
# How long before the end of the grace streams are told to go on elsewhere, so that it reaches their clients.
HAND_OVER_S: Final = 1.0


def engine_pool(
    config: GatewayConfig, catalog: ModelCatalog, gateway_id: str, dial: Callable[[str], grpc.aio.Channel]
) -> EnginePool:
    """Return the engines, none of them known yet; ``dial`` opens a channel to an engine's address."""
    return EnginePool(
        catalog,
        LinkOptions(
            gateway_id=gateway_id,
            max_buffered_tokens=config.max_buffered_tokens,
            silence_s=config.engine_silence_s,
            dial=dial,
        ),
        failover_wait_s=config.failover_wait_s,
        arrival_wait_s=config.scale_from_zero_s,
        allows_mixed_numerics=config.allow_mixed_numerics,
    )


def grpc_server(
    config: GatewayConfig, authenticator: Authenticator, registry: CollectorRegistry, *, shares_port: bool
) -> GrpcServer:
    """Return the gRPC server, without a service yet; `shares_port` lets further workers listen where it does."""
    return GrpcServer(
        config.listen_config(
            config.host,
            config.port,
            enable_reflection=config.enable_reflection,
            max_connections=_max_connections(config),
            max_concurrent_streams=MAX_STREAMS,
            max_connection_age_s=config.max_connection_age_s,
            refuses_unknown_fields=True,
            shares_port=shares_port,
        ),
        authenticator=authenticator,
        metrics=RpcMetrics(registry),
    )


def add_services(server: GrpcServer, generation: GatewayServicer, fleet: FleetServicer, scaler: ScalerServicer) -> None:
    """Have a server offer the gateway's services."""
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(generation, server.server)
    server.add_service_name("loraplex.v1.GatewayService")
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server.server)
    server.add_service_name("loraplex.v1.FleetService")
    externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(scaler, server.server)
    server.add_service_name("externalscaler.ExternalScaler")


def store_channel(config: GatewayConfig, peers: Peers) -> PeerChannel | None:
    """Return the channel to the adapter store; None without one. The caller closes it."""
    return PeerChannel(peers, config.store_target, tls_name=config.store_tls_name) if config.store_target else None


def http_server(config: GatewayConfig, app: ASGIApp, *, shares_port: bool) -> HttpServer:
    """Return the server of the OpenAI-compatible API; `shares_port` lets further workers listen where it does."""
    return HttpServer(
        app,
        host=config.host,
        port=config.http_port,
        shares_port=shares_port,
        max_connections=_max_connections(config),
        max_connection_age_s=config.max_connection_age_s,
        tls=TlsFiles(cert=config.tls_cert, key=config.tls_key, ca=config.tls_client_ca),
    )


def metrics_server(
    config: GatewayConfig, authenticator: Authenticator, registry: CollectorRegistry, control: ControlServer | None
) -> MetricsServer | ControlServer:
    """Return what shows the metrics: the server of /metrics, or in a worker `control`, as its parent has that."""
    if control is not None:
        return control
    exposition = Exposition(
        registry,
        audience=Audience(config.metrics_key, authenticator),
        vllm_labels={"engine": FLEET_LABEL},
    )
    return MetricsServer(exposition, config.host, config.metrics_port)


def control_server(
    setup: WorkerSetup,
    core: GatewayCore,
    admission: AdmissionController,
    metrics: GatewayMetrics,
    registry: CollectorRegistry,
) -> ControlServer:
    """Return a worker's control socket, and have its core ask its siblings by theirs."""
    core.cancel_elsewhere = partial(cancel_at_sibling, setup)
    return ControlServer(
        setup, registry, metrics.vllm.num_waiting, lambda: admission.num_requests, cancel=core.cancel_here
    )


async def drain(
    config: GatewayConfig, grpc: GrpcServer, http: HttpServer, *, admission: AdmissionController, claims: RequestClaims
) -> None:
    """Take both servers for clients out of service: settle, refuse new requests, wait for running ones.

    Streams that are left at the end of the grace are told so, with what their clients need to go on elsewhere.
    """

    async def drain_http() -> None:
        await asyncio.sleep(config.drain_settle_s)
        admission.drain()
        await http.stop(grace_s=config.drain_grace_s)

    async def hand_over() -> None:
        before_end_s = min(HAND_OVER_S, config.drain_grace_s / 2)
        await asyncio.sleep(config.drain_settle_s + config.drain_grace_s - before_end_s)
        claims.hand_over()

    handing_over = asyncio.create_task(hand_over(), name="hand-over")
    try:
        await asyncio.gather(grpc.drain(settle_s=config.drain_settle_s, grace_s=config.drain_grace_s), drain_http())
    finally:
        await cancel_and_wait(handing_over)


def _max_connections(config: GatewayConfig) -> int:
    """Return the most connections of one of the two ports for clients."""
    return connections_per_port(config.max_connections, num_ports=2)
