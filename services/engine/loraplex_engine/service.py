"""One engine process: the engine, its gRPC and metrics servers, its connection to the store, its lease in Valkey."""

from __future__ import annotations

import asyncio
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from loraplex.v1 import adapter_pb2, engine_pb2_grpc
from loraplex_common.adapter_names import AdapterNames
from loraplex_common.alias_feed import AliasFeed
from loraplex_common.auth import Authenticator
from loraplex_common.errors import EngineHungError, StoreUnavailableError
from loraplex_common.exposition import Audience, Exposition, new_registry
from loraplex_common.grpc_server import GrpcServer
from loraplex_common.lifecycle import end_after
from loraplex_common.log import get_logger
from loraplex_common.metrics_http import MetricsServer
from loraplex_common.peer_targets import in_turn
from loraplex_common.peers import PeerChannel
from loraplex_common.rpc_metrics import RpcMetrics
from loraplex_common.service_settings import refuse_cluster
from loraplex_common.tasks import Supervisor
from loraplex_common.version import package_version
from loraplex_common.vllm_metrics import ENGINE_LABEL

from loraplex_engine import build
from loraplex_engine.adapters.arena import HostArena
from loraplex_engine.loop.engine import Engine
from loraplex_engine.loop.residency_feed import ResidencyFeed
from loraplex_engine.messages import ImageRefused, ResidencyChanged, StoreEvent, WantImage
from loraplex_engine.metrics.collector import EngineCollector
from loraplex_engine.metrics.prefetch import PrefetchMetrics
from loraplex_engine.metrics.ranks import RankCollector
from loraplex_engine.metrics.requests import RequestMetrics
from loraplex_engine.metrics.residency import ResidencyMetrics
from loraplex_engine.rpc.draining import Draining
from loraplex_engine.rpc.registration import Registration, advertised, engine_record
from loraplex_engine.rpc.rule_making import RuleMaker
from loraplex_engine.rpc.servicer import EngineIdentity, EngineServicer
from loraplex_engine.rpc.store_client import AdapterClient, Attachment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc
    import torch
    from loraplex_common.registry import EngineRecord
    from loraplex_common.weight_digests import FileState
    from prometheus_client import CollectorRegistry

    from loraplex_engine.config import EngineConfig
    from loraplex_engine.constraints.compiler import Constraints
    from loraplex_engine.limits import EngineLimits

SERVICE_NAME = "loraplex.v1.EngineService"
MAX_STREAMS = 256  # concurrent calls per connection; a gateway has one session on it
STOP_GRACE_S = 1.0
EXIT_HUNG = 70
"""Exit status of an engine whose step loop hangs (EX_SOFTWARE): its supervisor should start it again."""
GOODBYE_S = 3.0
"""Time for the last messages of an engine whose step loop hangs."""
LOST_GOODBYE_S = 1.5
"""The same of an engine that has lost a rank, whose step loop holds nothing that an orderly end needs."""

_Argument = TypeVar("_Argument")

_log = get_logger()


class EngineService:
    """All parts of one engine process; create it inside a running event loop.

    Args:
        config: Which model to serve, and how.

    Attributes:
        engine: The engine.
        engine_id: Unique among all engines that ever ran.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._crashed: asyncio.Future[None] = self._loop.create_future()
        self._info, files = build.read_base_model(config)
        device = build.resolve_device(config)
        limits = build.engine_limits(config, self._info, device)
        self.engine_id = f"{uuid.uuid4().hex}"
        registry = new_registry("engine")
        self._names = AdapterNames()
        self._feed = ResidencyFeed(config.residency_events)
        self._residency_metrics = ResidencyMetrics(registry)
        self._prefetch_metrics = PrefetchMetrics(registry, limits.page_bytes)
        self._client: AdapterClient | None = None
        self._has_lost_rank = False
        self._rank_book = build.RankBook()
        self._constraints = self._make_constraints(limits.eos_token_ids)
        self.engine = self._make_engine(limits, device, files)
        registry.register(RankCollector(self.engine, self._rank_book))
        registry.register(EngineCollector(self.engine, self._feed, self._residency_metrics, self._names))
        self._draining = Draining(self.engine)
        self._servicer = EngineServicer(
            self.engine,
            self._feed,
            self._draining,
            identity=self._identity(),
            config=config,
            metrics=RequestMetrics(registry),
            rules=RuleMaker(self._constraints.compiler, limits.eos_token_ids),
        )
        self._authenticator = Authenticator.from_file(config.api_keys_file)
        self._peers = config.peers()
        self._grpc = self._make_grpc(RpcMetrics(registry))
        self._metrics_http = self._make_metrics_http(registry)
        self._supervisor = Supervisor()
        self._valkey = config.connect_valkey(config.redis_url) if config.redis_url else None
        self._registration: Registration | None = None

    def _make_engine(self, limits: EngineLimits, device: torch.device, files: tuple[FileState, ...]) -> Engine:
        arena = HostArena(limits.num_arena_slots, limits.page_bytes, self._config.tensor_parallel)
        host = build.RankHost(arena_fd=arena.fd, on_lost=self._on_rank_lost, book=self._rank_book)
        return Engine(
            limits,
            build.runner_factory(self._config, self._info, device, files=files, host=host),
            on_store_event=lambda event: self._call_soon(self._on_store_event, event),
            on_crash=self._on_crash,
            filler=self._constraints.filler,
            arena=arena,
        )

    def _make_constraints(self, eos_token_ids: tuple[int, ...]) -> Constraints:
        return build.constraints_of(self._config, self._info, eos_token_ids)

    def _make_grpc(self, metrics: RpcMetrics) -> GrpcServer:
        config = self._config
        listen = config.listen_config(
            config.host,
            config.port,
            enable_reflection=config.enable_reflection,
            max_concurrent_streams=MAX_STREAMS,
            max_connection_age_s=config.max_connection_age_s,
        )
        return GrpcServer(listen, authenticator=self._authenticator, metrics=metrics)

    def _make_metrics_http(self, registry: CollectorRegistry) -> MetricsServer:
        config = self._config
        exposition = Exposition(
            registry,
            audience=Audience(config.metrics_key, self._authenticator),
            vllm_labels={"model_name": self._info.name, "engine": ENGINE_LABEL},
        )
        return MetricsServer(exposition, config.host, config.metrics_port)

    async def start(self) -> tuple[int, int]:
        """Open the ports, attach and register; return the gRPC and the metrics port. Raises `OSError` if it cannot."""
        await refuse_cluster(self._valkey)
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self._servicer, self._grpc.server)
        self._grpc.add_service_name(SERVICE_NAME)
        port = await self._grpc.start()
        metrics_port = await self._metrics_http.start()
        self._supervisor.spawn(self._authenticator.follow(), name="credentials")
        if self._config.store_target is not None:
            dial, wait_s = partial(self._dial_store, in_turn(self._config.store_target)), self._config.store_wait_s
            self._client = AdapterClient(dial, self.engine, self._feed, self._attachment(), wait_s=wait_s)
            self._supervisor.spawn(self._client.run(), name="adapter-client")
            self._supervisor.spawn(self._follow_names(self._config.store_target), name="alias-feed")
        self._grpc.set_ready(True)
        if self._valkey is not None:
            self._registration = Registration(self._valkey, self._record(port))
            await self._registration.renew()
            self._draining.registration = self._registration
            self._supervisor.spawn(self._registration.run(), name="registration")
        return port, metrics_port

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set.

        Raises:
            BackgroundTaskError: If a background task ends.
            RuntimeError: If the step loop dies.
            EngineHungError: If the step loop hangs.
        """
        serving = asyncio.create_task(self._supervisor.run_until(stop), name="serving")
        await asyncio.wait([serving, self._crashed], return_when=asyncio.FIRST_COMPLETED)
        if self._crashed.done():
            serving.cancel()
            self._crashed.result()
        await serving

    async def drain(self) -> None:
        """Go out of service: new requests are refused, running ones get their grace, every stream ends."""
        await self._draining.begin_shutdown()
        self._grpc.set_ready(False)
        await asyncio.sleep(self._config.drain_settle_s)
        num_ended = await asyncio.wrap_future(self.engine.drain(self._config.drain_grace_s))
        _log.info("drained", ended_before_their_time=num_ended)
        self._servicer.close_streams()

    async def close(self) -> None:
        """Release everything; requests that still run end with DRAINING."""
        self._servicer.close_streams()
        if self._registration is not None:
            await self._registration.withdraw()
        await self._grpc.drain(settle_s=0.0, grace_s=STOP_GRACE_S)
        await self._supervisor.close()
        await self._metrics_http.stop()
        await self._constraints.close()
        if self._valkey is not None:
            await self._valkey.aclose()
        await asyncio.to_thread(self.engine.close)

    async def _follow_names(self, store_target: str) -> None:
        """Keep the names of adapters for the metrics; the rest of the engine knows only digests."""
        channel = PeerChannel(self._peers, store_target, tls_name=self._config.store_tls_name)
        try:
            await AliasFeed(channel, [self._names]).run()
        finally:
            await channel.close()

    def _dial_store(self, targets: Iterator[str]) -> grpc.aio.Channel:
        return self._peers.open(next(targets), tls_name=self._config.store_tls_name)

    def _call_soon(self, function: Callable[[_Argument], None], argument: _Argument) -> None:
        """Call a function on this thread from the step loop's; nothing happens once the event loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)

    def _on_store_event(self, event: StoreEvent) -> None:
        if isinstance(event, ResidencyChanged):
            self._residency_metrics.changed(event, time.monotonic())
            is_under_way = self._client is not None and self._client.is_prefetching(event.digest)
            self._prefetch_metrics.changed(event, is_under_way=is_under_way)
            self._feed.append(event)
            if self._client is not None:
                self._client.changed(event)
        elif self._client is not None:
            self._client.want(event)
        else:
            self._refuse(event)

    def _refuse(self, event: WantImage) -> None:
        error = StoreUnavailableError(f"adapter {event.digest}: this engine has no adapter store (--store-target)")
        self.engine.post(ImageRefused(event.digest, error))

    def _on_rank_lost(self, trouble: str) -> None:
        """Handle the end of a tensor-parallel rank, on the thread that watches them; it may come before the engine is ready."""
        self._has_lost_rank = True
        end_after(LOST_GOODBYE_S, EXIT_HUNG)
        if (engine := getattr(self, "engine", None)) is not None:
            engine.give_up(trouble)

    def _on_crash(self, cause: BaseException) -> None:
        """Handle the step loop's end, on a thread of the engine."""
        if isinstance(cause, EngineHungError):
            what = "has lost a rank" if self._has_lost_rank else "hangs"
            _log.critical(f"the step loop {what}; the engine ends", cause=cause.message)
            end_after(GOODBYE_S, EXIT_HUNG)  # the thread that hangs may hold what an orderly end needs
        self._call_soon(self._fail, cause)

    def _fail(self, cause: BaseException) -> None:
        """Have `run_until` raise."""
        if self._crashed.done():
            return
        self._grpc.set_ready(False)
        if isinstance(cause, EngineHungError):
            self._servicer.close_streams(cause)
            self._crashed.set_exception(cause)
            return
        error = RuntimeError("the step loop died")
        error.__cause__ = cause
        self._crashed.set_exception(error)

    def _base_model(self) -> adapter_pb2.BaseModel:
        return adapter_pb2.BaseModel(
            name=self._info.name,
            fingerprint=self._info.fingerprint,
            aliases=self._info.aliases,
            max_model_len=self.engine.limits.max_model_len,
            vocab_size=self._info.vocab_size,
        )

    def _identity(self) -> EngineIdentity:
        return EngineIdentity(engine_id=self.engine_id, base_model=self._base_model(), version=package_version())

    def _attachment(self) -> Attachment:
        return Attachment(
            engine_id=self.engine_id,
            base_model=self._base_model(),
            max_image_pages=self.engine.limits.max_image_pages,
            max_rank=build.max_rank(self._config, build.resolve_device(self._config)),
            max_added_tokens=self.engine.limits.max_added_tokens,
        )

    def _record(self, port: int) -> EngineRecord:
        target = advertised(self._config, port)
        return engine_record(self.engine_id, target, self._info, self.engine.limits)
