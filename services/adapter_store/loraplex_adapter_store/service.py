"""Builds the store, runs it, and takes it down."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from google.longrunning import operations_pb2_grpc
from loraplex.v1 import adapter_store_pb2_grpc
from loraplex_common.exposition import Audience, Exposition
from loraplex_common.grpc_server import GrpcServer
from loraplex_common.metrics_http import MetricsServer
from loraplex_common.rpc_metrics import RpcMetrics
from loraplex_common.tasks import Supervisor

from loraplex_adapter_store.aliases import AliasTable
from loraplex_adapter_store.arrivals import Arrivals
from loraplex_adapter_store.attach.attached import AttachedEngines
from loraplex_adapter_store.bases import KnownBases
from loraplex_adapter_store.contents import Contents
from loraplex_adapter_store.core import Core, make_core, make_images
from loraplex_adapter_store.downloads import Downloads
from loraplex_adapter_store.hints import Hints
from loraplex_adapter_store.images import ImageCache
from loraplex_adapter_store.imports.budget import ImportBudget
from loraplex_adapter_store.imports.checker import CheckpointChecker
from loraplex_adapter_store.imports.importer import Importer
from loraplex_adapter_store.imports.intake import Intake
from loraplex_adapter_store.imports.long_running import LongRunning
from loraplex_adapter_store.imports.sources import Sources
from loraplex_adapter_store.lifecycle import Lifecycle
from loraplex_adapter_store.metrics import ReplicaFactorCollector
from loraplex_adapter_store.operations import OperationsServicer
from loraplex_adapter_store.preparing import ImagePreparer
from loraplex_adapter_store.push.assembly import make_pusher
from loraplex_adapter_store.reports import Reports
from loraplex_adapter_store.repository.garbage import GarbageCollector
from loraplex_adapter_store.repository.moves import AliasMoves
from loraplex_adapter_store.resolve.assembly import make_resolver
from loraplex_adapter_store.revisions import RevisionFinder
from loraplex_adapter_store.servicer import AdapterStoreServicer
from loraplex_adapter_store.tiers import find_adapters
from loraplex_adapter_store.watchers import Watchers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_adapter_store.config import StoreConfig
    from loraplex_adapter_store.repository.engines import EngineHoldings
    from loraplex_adapter_store.resolve.sweeper import ResolvedSweeper

MAX_STREAMS: Final = 1024  # concurrent calls per connection; a gateway needs far fewer
SERVICE: Final = "loraplex.v1.AdapterStoreService"
OPERATIONS_SERVICE: Final = "google.longrunning.Operations"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningStore:
    """A store that serves.

    Attributes:
        supervisor: Owns the background tasks; see `Supervisor.run_until`.
    """

    grpc_port: int
    metrics_port: int
    supervisor: Supervisor
    images: ImageCache
    importer: Importer
    attached: AttachedEngines

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if an idle store holds anything it should have released."""
        self.images.check_integrity()
        self.importer.budget.check_integrity()


@asynccontextmanager
async def running_store(config: StoreConfig) -> AsyncIterator[RunningStore]:
    """Run a store inside the block and drain it at the end."""
    bases = _bases(config)
    async with AsyncExitStack() as stack:
        core = make_core(config, bases, stack)
        images = make_images(core, stack)
        attached = AttachedEngines(core.client, core.holdings, images, core.metrics, core.executor)
        watchers = Watchers(core.client)
        aliases = AliasTable(core.client, core.catalog, bases.fingerprints, watchers)
        hints = Hints(attached, core.holdings, core.catalog, images)
        preparer = ImagePreparer(images, attached.geometries, max_waiting=config.prepare_images)
        importer = _importer(core, bases, aliases, attached, preparer)
        operations, sources = _operations(core, stack), _sources(core, stack)
        intake = _intake(core, importer, operations, sources)
        lifecycle = _lifecycle(core, aliases, attached)
        resolver, sweeper = make_resolver(core, sources, importer, lifecycle, stack)
        servicer = AdapterStoreServicer(
            lifecycle=lifecycle,
            arrivals=Arrivals(intake, make_pusher(core, intake, importer, attached, hints), resolver),
            aliases=aliases,
            attached=attached,
            hints=hints,
            contents=_contents(core, aliases, attached, stack),
        )
        metrics_port = await _serve_metrics(core, ReplicaFactorCollector(attached.held, aliases.label_of), stack)
        supervisor = await stack.enter_async_context(Supervisor())
        await find_adapters(config, core.client, supervisor)
        supervisor.spawn(watchers.run(), name="leases of watches")
        _spawn(supervisor, core, aliases, hints, preparer, sweeper)
        server = _server(core, servicer, operations)
        grpc_port = await server.start()
        stack.push_async_callback(_drain, server, config, attached, aliases)
        server.set_ready(True)
        yield RunningStore(
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            supervisor=supervisor,
            images=images,
            importer=importer,
            attached=attached,
        )


def _bases(config: StoreConfig) -> KnownBases:
    return KnownBases.load(
        config.model, name=config.served_model_name, aliases=config.model_alias, text_only=config.text_only
    )


def _lifecycle(core: Core, aliases: AliasTable, attached: AttachedEngines) -> Lifecycle:
    leases = partial(_all_leases, attached, core.holdings)
    return Lifecycle(core.catalog, AliasMoves(core.client), leases, aliases.wait_for, aliases.revisions_of)


def _operations(core: Core, stack: AsyncExitStack) -> LongRunning:
    operations = LongRunning(core.client)
    stack.push_async_callback(operations.close)
    return operations


def _contents(core: Core, aliases: AliasTable, attached: AttachedEngines, stack: AsyncExitStack) -> Contents:
    reports = Reports(core.blobs, attached)
    stack.push_async_callback(asyncio.to_thread, reports.close)
    return Contents(RevisionFinder(core.catalog, aliases), Downloads(core.catalog, core.blobs), reports)


def _importer(
    core: Core, bases: KnownBases, aliases: AliasTable, attached: AttachedEngines, preparer: ImagePreparer
) -> Importer:
    config = core.config
    budget = ImportBudget(
        max_bytes=2 * config.max_adapter_bytes,
        max_running=config.max_concurrent_imports,
        max_pending=config.max_pending_imports,
    )
    checker = CheckpointChecker(bases, attached.limits, attached.weight_norms, core.executor, core.signatures)
    return Importer(
        checker, core.catalog, core.blobs, budget, core.metrics, told=aliases.wait_for, on_stored=preparer.imported
    )


def _intake(core: Core, importer: Importer, operations: LongRunning, sources: Sources) -> Intake:
    max_bytes = core.config.max_adapter_bytes
    return Intake(importer, operations, core.catalog, importer.budget, sources, max_adapter_bytes=max_bytes)


def _sources(core: Core, stack: AsyncExitStack) -> Sources:
    sources = Sources(core.config, core.credentials, core.signatures)
    stack.push_async_callback(sources.close)
    return sources


def _server(core: Core, servicer: AdapterStoreServicer, operations: LongRunning) -> GrpcServer:
    config = core.config
    listen = config.listen_config(
        config.host,
        config.port,
        enable_reflection=config.enable_reflection,
        max_concurrent_streams=MAX_STREAMS,
        max_connection_age_s=config.max_connection_age_s,
    )
    server = GrpcServer(listen, authenticator=core.authenticator, metrics=RpcMetrics(core.metrics.registry))
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(servicer, server.server)
    operations_pb2_grpc.add_OperationsServicer_to_server(OperationsServicer(operations), server.server)
    server.add_service_name(SERVICE)
    server.add_service_name(OPERATIONS_SERVICE)
    return server


def _spawn(
    supervisor: Supervisor,
    core: Core,
    aliases: AliasTable,
    hints: Hints,
    preparer: ImagePreparer,
    sweeper: ResolvedSweeper,
) -> None:
    """Start what runs beside the servers."""
    collector = GarbageCollector(
        core.client,
        core.blobs,
        core.holdings,
        interval_s=core.config.gc_interval_s,
        on_garbage=partial(hints.evict, ""),
    )
    supervisor.spawn(aliases.run(), name="name table")
    supervisor.spawn(core.authenticator.follow(), name="credentials")
    supervisor.spawn(collector.run(), name="garbage collector")
    supervisor.spawn(preparer.run(), name="image preparer")
    supervisor.spawn(sweeper.run(), name="resolved adapters")


async def _serve_metrics(core: Core, replicas: ReplicaFactorCollector, stack: AsyncExitStack) -> int:
    config = core.config
    core.metrics.registry.register(replicas)
    audience = Audience(config.metrics_key, core.authenticator)
    exposition = Exposition(core.metrics.registry, audience=audience)
    metrics_server = MetricsServer(exposition, config.host, config.metrics_port)
    port = await metrics_server.start()
    stack.push_async_callback(metrics_server.stop)
    return port


async def _all_leases(attached: AttachedEngines, holdings: EngineHoldings) -> dict[str, int]:
    """Return leases on all engines: present ones for engines attached here, else the last published ones."""
    total = await holdings.leases(without=attached.ids())
    for digest, count in attached.leases().items():
        total[digest] = total.get(digest, 0) + count
    return total


async def _drain(server: GrpcServer, config: StoreConfig, attached: AttachedEngines, aliases: AliasTable) -> None:
    """Go out of service; streams without an end of their own are ended, and their clients connect elsewhere."""
    draining = asyncio.create_task(server.drain(settle_s=config.drain_settle_s, grace_s=config.drain_grace_s))
    await asyncio.sleep(config.drain_settle_s)
    aliases.end_watches()
    attached.end_sessions()
    await draining
