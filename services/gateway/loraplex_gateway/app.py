"""Puts the gateway together, starts it and takes it down."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_names import AdapterNames
from loraplex_common.alias_feed import AliasFeed
from loraplex_common.auth import Authenticator
from loraplex_common.exposition import new_registry
from loraplex_common.log import get_logger
from loraplex_common.quotas_file import QuotasFile
from loraplex_common.service_settings import is_loopback, refuse_cluster
from loraplex_common.tasks import Supervisor

from loraplex_gateway.adapters.names import NameTable
from loraplex_gateway.adapters.prefetch import PrefetchHints
from loraplex_gateway.adapters.resolution import SourceResolver
from loraplex_gateway.adapters.store_admin import StoreAdmin
from loraplex_gateway.engines.collector import FleetCollector
from loraplex_gateway.engines.registry_watcher import RegistryWatcher
from loraplex_gateway.fleet.watch import FleetWatch
from loraplex_gateway.grpc.servicer import GatewayServicer
from loraplex_gateway.grpc.servicer_fleet import FleetServicer
from loraplex_gateway.grpc.servicer_scaler import ScalerServicer
from loraplex_gateway.metrics.gateway import GatewayMetrics
from loraplex_gateway.openai.app import make_app
from loraplex_gateway.openai.body_reader import BodyReader
from loraplex_gateway.openai.context import HttpContext
from loraplex_gateway.openai.fleet_page import FleetPage
from loraplex_gateway.openai.model_list import ModelList
from loraplex_gateway.quotas.calls import TenantQuotas
from loraplex_gateway.requests.admission import AdmissionController
from loraplex_gateway.requests.claims import RequestClaims
from loraplex_gateway.requests.core import GatewayCore
from loraplex_gateway.requests.listing import ModelListing
from loraplex_gateway.requests.preparation import Preparer, RequestLimits
from loraplex_gateway.requests.resumption import Resumption
from loraplex_gateway.resume.keys import ResumeKeyFile, ResumeKeys
from loraplex_gateway.scaling.demand import DemandBoard
from loraplex_gateway.servers import (
    add_services,
    control_server,
    drain,
    engine_pool,
    grpc_server,
    http_server,
    metrics_server,
    store_channel,
)
from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.models import ModelCatalog, load_served_models
from loraplex_gateway.text.voices import Voices
from loraplex_gateway.usage.ledger import UsageLedger
from loraplex_gateway.workers.control import load_of_all
from loraplex_gateway.workers.setup import new_gateway_id

if TYPE_CHECKING:
    from loraplex_common.grpc_server import GrpcServer

    from loraplex_gateway.config import GatewayConfig
    from loraplex_gateway.openai.server import HttpServer
    from loraplex_gateway.workers.control import ControlServer
    from loraplex_gateway.workers.setup import WorkerSetup

# How long `start` waits for the first look at engines and names, so that "ready" means ready where all is well.
FIRST_SYNC_S: Final = 5.0

_log = get_logger()


class GatewayApp:
    """One gateway process.

    Args:
        config: Its ports, its peers and its limits.
        setup: What a worker shares with its siblings; None for a gateway of one process.

    Attributes:
        grpc_port: Bound gRPC port, once started.
        http_port: Bound HTTP port, once started.
        metrics_port: Bound port of /metrics, once started.
        http: The HTTP server.
        workers: Prepare prompts away from the event loop.
        voices: Models as adapters speak.
    """

    def __init__(self, config: GatewayConfig, setup: WorkerSetup | None = None) -> None:
        if setup is not None:
            config = replace(config, port=setup.port, http_port=setup.http_port)
        self.config, self._setup = config, setup
        self.grpc_port = self.http_port = self.metrics_port = 0
        self.gateway_id = new_gateway_id() if setup is None else setup.gateway_id
        self._metrics_registry = new_registry("gateway")
        self._authenticator = Authenticator.from_file(config.api_keys_file)
        self.workers = FairWorkers()
        self._valkey = config.connect_valkey(config.redis_url)
        self._peers = config.peers()
        self._dial = partial(self._peers.open, tls_name=config.engine_tls_name)
        self._store = store_channel(config, self._peers)
        self._store_admin = StoreAdmin.over(store_channel(config, self._peers.without_key()))
        self._hints = PrefetchHints(self._store, clock=time.monotonic) if self._store is not None else None
        self.names, self._adapter_names = NameTable(), AdapterNames()
        self.voices = Voices.over(self._store)
        self.catalog = self._load_models()
        self.pool = engine_pool(config, self.catalog, self.gateway_id, self._dial)
        self.fleet = FleetWatch(self.pool, self._adapter_names, self._dial)
        self._registry = RegistryWatcher(self._valkey, self.pool)
        self.admission = AdmissionController(
            max_concurrent=config.max_concurrent_requests, max_queued=config.max_queued_requests, clock=time.monotonic
        )
        self.claims = RequestClaims(self._valkey, self.gateway_id)
        file = None if config.resume_key_file is None else ResumeKeyFile(config.resume_key_file)
        self._resume_keys = ResumeKeys(file=file, valkey=self._valkey)
        self.metrics = self._make_metrics()
        self._board = DemandBoard(self._valkey, self.gateway_id, self.metrics.demand)
        self.quotas = self._make_quotas()
        self.sources = SourceResolver.over(self._store, self.names, config, self.metrics)
        self.ledger = UsageLedger.of(config, self._valkey, self.metrics)
        self.core = self._make_core()
        self._listing = ModelListing(self.catalog, self.names, self.pool)
        self._models = ModelList(self._listing)
        self._grpc = self._make_grpc()
        self.http = self._make_http()
        self._metrics_server = metrics_server(config, self._authenticator, self._metrics_registry, self._as_worker())
        self._supervisor, self._is_draining = Supervisor(), False

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served: an engine takes them, or will, and the gateway is not going away."""
        return (self.pool.has_candidate or self.config.scale_from_zero_s > 0) and not self._is_draining

    async def start(self) -> None:
        """Listen on all ports, then look for engines and names; returns once that has been tried.

        Raises:
            OSError: If an address cannot be bound, or Valkey is a cluster.
        """
        await refuse_cluster(self._valkey)
        self.grpc_port = await self._grpc.start()
        self.http_port = await self.http.start()
        self.metrics_port = await self._metrics_server.start()
        self._supervisor.spawn(self.http.run(), name="http-server")
        self._supervisor.spawn(self.claims.run(), name="claims")
        self._supervisor.spawn(self.quotas.run(), name="quotas")
        self._supervisor.spawn(self._resume_keys.run(), name="resume-keys")
        self._supervisor.spawn(self.ledger.run(), name="usage-ledger")
        self._supervisor.spawn(self._board.run(), name="demand-board")
        self._supervisor.spawn(self._authenticator.follow(), name="credentials")
        if self._authenticator.is_open and not is_loopback(self.config.host):
            _log.warning("everybody who reaches this gateway may use it: --api-keys-file says who may")
        if self._store is not None:
            feed = AliasFeed(self._store, [self.names, self._adapter_names], watcher_id=self.gateway_id)
            self._supervisor.spawn(feed.run(), name="alias-feed")
            self._supervisor.spawn(self._models.run(), name="model-list")
        self._supervisor.spawn(self.pool.run(), name="engine-pool")
        self._supervisor.spawn(self._report_readiness(), name="readiness")
        try:
            async with asyncio.timeout(FIRST_SYNC_S):
                await self._first_sync()
        except TimeoutError:
            _log.warning(
                "started without a full view",
                has_engine=self.pool.has_candidate,
                has_names=self._store is None or self.names.is_synced,
            )
        self._supervisor.spawn(self._registry.run(), name="registry-watcher")

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until the event is set.

        Raises:
            BackgroundTaskError: If a background task dies.
        """
        await self._supervisor.run_until(stop)

    async def drain(self) -> None:
        """Go out of service without failing a stream: not ready, settle, refuse new requests, wait for running ones.

        Streams that are left at the end of the grace are told so, with what their clients need to go on elsewhere.
        """
        self._is_draining = True
        self.fleet.end_readers()
        await drain(self.config, self._grpc, self.http, admission=self.admission, claims=self.claims)

    async def close(self) -> None:
        """Release everything; safe after a failed start."""
        await self.http.stop(grace_s=0.0)
        await self._grpc.stop()
        await self._metrics_server.stop()
        await self._supervisor.close()
        await self.fleet.close()
        await self.pool.close()
        if self._hints is not None:
            await self._hints.close()
        await self.sources.close()
        await self.voices.close()
        await self.quotas.close()
        await self.claims.close()
        if self._store is not None:
            await self._store.close()
        if self._store_admin is not None:
            await self._store_admin.close()
        await self.ledger.close()
        await self._valkey.aclose()
        self.workers.close()

    async def _first_sync(self) -> None:
        """Wait for the registry, for a session with every engine it lists, and for the names."""
        await self._resume_keys.agree()
        await self._registry.poll_once()
        while self.pool.is_dialling:
            await self.pool.changed.wait()
        if self._store is not None:
            await self.names.wait_until_synced()

    async def _report_readiness(self) -> None:
        while True:
            changed = self.pool.changed
            self._grpc.set_ready(self.is_ready)
            await changed.wait()

    def _load_models(self) -> ModelCatalog:
        config, name = self.config, self.config.served_model_name
        models = load_served_models(
            config.model, self.workers, name=name, aliases=tuple(config.model_alias), text_only=config.text_only
        )
        return ModelCatalog(models, self.names)

    def _make_metrics(self) -> GatewayMetrics:
        metrics = GatewayMetrics(self._metrics_registry)
        metrics.watch_queue(self.admission.waiting_by_priority)
        num_waiting = metrics.vllm.num_waiting
        self._metrics_registry.register(FleetCollector(self.catalog, self.pool, self._adapter_names, num_waiting))
        return metrics

    def _as_worker(self) -> ControlServer | None:
        """Return what shows this process's metrics to a parent, and how its siblings reach it; None without any."""
        return (
            None
            if self._setup is None
            else control_server(self._setup, self.core, self.admission, self.metrics, self._metrics_registry)
        )

    def _make_quotas(self) -> TenantQuotas:
        config = self.config
        return TenantQuotas.over(
            QuotasFile(config.quotas_file) if config.quotas_file is not None else None,
            lambda: config.connect_valkey(config.redis_url),
            self.gateway_id,
            self.metrics.count_quota_refusal,
        )

    def _make_core(self) -> GatewayCore:
        limits = RequestLimits.of(self.config)
        preparer = Preparer(self.catalog, self.names, self.pool, self.sources, voices=self.voices, limits=limits)
        core = GatewayCore(
            preparer,
            self.admission,
            self.claims,
            self.pool,
            resumption=Resumption(self._resume_keys, window_s=self.config.resume_window_s),
            hints=self._hints,
            metrics=self.metrics,
        )
        core.ledger = self.ledger
        return core

    def _make_grpc(self) -> GrpcServer:
        generation = GatewayServicer(self.core, self.quotas, self._listing, slow_client_s=self.config.slow_client_s)
        is_worker = self._setup is not None
        server = grpc_server(self.config, self._authenticator, self._metrics_registry, shares_port=is_worker)
        scaler = ScalerServicer(self.catalog, self.pool, self._board)
        add_services(server, generation, FleetServicer(self.pool, self.fleet, self._dial), scaler)
        return server

    def _make_http(self) -> HttpServer:
        context = HttpContext(
            core=self.core,
            quotas=self.quotas,
            catalog=self.catalog,
            listing=self._listing,
            models=self._models,
            store_admin=self._store_admin,
            is_local=is_loopback(self.config.host),
            authenticator=self._authenticator,
            metrics_address=lambda: f"port {self.metrics_port}",
            bodies=BodyReader(on_large_gone=self.workers.give_memory_back),
            workers=self.workers,
            slow_client_s=self.config.slow_client_s,
            is_ready=lambda: self.is_ready,
            num_requests=partial(load_of_all, self._setup, lambda: self.admission.num_requests),
            cors_origins=self.config.cors_allow_origin,
            page=FleetPage.of(self.config, self.fleet, self._store, self.gateway_id),
        )
        return http_server(self.config, make_app(context), shares_port=self._setup is not None)
