"""EngineService on the wire: each RPC converts, calls one method, and converts back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex.v1 import adapter_pb2, engine_pb2, engine_pb2_grpc
from loraplex_common import geometry_wire
from loraplex_common.errors import DrainingError, InvalidParameterError

from loraplex_engine.adapters.adapter import AdapterStatus
from loraplex_engine.messages import ResidencyState
from loraplex_engine.rpc import wire
from loraplex_engine.rpc.pool_watch import PoolWatch
from loraplex_engine.rpc.session import GatewaySession, SessionTimes
from loraplex_engine.rpc.validation import RequestLimits, check_digest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from concurrent.futures import Future

    import grpc
    from google.protobuf.duration_pb2 import Duration
    from loraplex_common.errors import LoraplexError

    from loraplex_engine.config import EngineConfig
    from loraplex_engine.loop.engine import Engine
    from loraplex_engine.loop.residency_feed import ResidencyFeed
    from loraplex_engine.messages import ResidencyChanged
    from loraplex_engine.metrics.requests import RequestMetrics
    from loraplex_engine.rpc.draining import Draining
    from loraplex_engine.rpc.rule_making import RuleMaker

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
DEFAULT_LOAD_INTERVAL_S: Final = 0.1
MIN_LOAD_INTERVAL_S: Final = 0.01
DEFAULT_DRAIN_S: Final = 30.0
API_REVISIONS: Final = ("v1",)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineIdentity:
    """How an engine identifies itself.

    Attributes:
        engine_id: Unique among all engines that ever ran.
        version: Version of the software.
    """

    engine_id: str
    base_model: adapter_pb2.BaseModel
    version: str


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """Serves one engine to gateways and operators.

    Args:
        engine: The engine.
        feed: History of the engine's residency.
        draining: Takes the engine out of service and back.
        identity: How the engine identifies itself.
        config: Limits of sessions.
        metrics: Is told of requests.
        rules: Makes what outputs must keep to.
    """

    def __init__(
        self,
        engine: Engine,
        feed: ResidencyFeed,
        draining: Draining,
        *,
        identity: EngineIdentity,
        config: EngineConfig,
        metrics: RequestMetrics,
        rules: RuleMaker,
    ) -> None:
        self._engine = engine
        self._rules = rules
        self._feed = feed
        self._draining = draining
        self._identity = identity
        self._config = config
        self._metrics = metrics
        base = identity.base_model
        self._limits = RequestLimits(
            vocab_size=base.vocab_size,
            max_model_len=base.max_model_len,
            eos_token_ids=engine.limits.eos_token_ids,
            max_added_tokens=engine.limits.max_added_tokens,
        )
        self._pool = PoolWatch(engine)
        self._is_closing = asyncio.Event()
        self._sessions: set[GatewaySession] = set()

    def close_streams(self, error: LoraplexError | None = None) -> None:
        """End watches and sessions, and refuse new ones; sessions still send what is pending.

        Args:
            error: The error that sessions end with; `DrainingError` if None.
        """
        self._is_closing.set()
        for session in self._sessions:
            session.close(error or _draining())

    async def Session(
        self, request_iterator: AsyncIterator[engine_pb2.SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        """Carry all requests of one gateway."""
        if self._is_closing.is_set():
            raise _draining()
        session = GatewaySession(
            self._engine,
            self._feed,
            limits=self._limits,
            metrics=self._metrics,
            rules=self._rules,
            times=SessionTimes(
                grace_s=self._config.session_grace_s,
                max_silence_s=self._config.load_report_s,
                max_stall_s=self._config.outbox_max_age_s,
            ),
        )
        self._sessions.add(session)
        try:
            async with aclosing(session.responses(request_iterator)) as responses:
                response = await anext(responses)
                response.welcome.engine_id = self._identity.engine_id
                response.welcome.base_fingerprint = self._identity.base_model.fingerprint
                response.welcome.numerics = self._engine.limits.numerics
                response.welcome.max_silence.FromNanoseconds(round(self._config.load_report_s * 1e9))
                yield response
                async for response in responses:
                    yield response
        finally:
            self._sessions.discard(session)

    async def GetEngineInfo(
        self, request: engine_pb2.GetEngineInfoRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.GetEngineInfoResponse:
        """Describe the engine."""
        limits = self._engine.limits
        return engine_pb2.GetEngineInfoResponse(
            engine_id=self._identity.engine_id,
            base_model=self._identity.base_model,
            geometry=geometry_wire.to_message(self._engine.geometry),
            target_modules=self._engine.geometry.projection_names,
            num_pages=limits.num_pages,
            block_tokens=limits.block_tokens,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
            backend=self._engine.backend,
            api_revisions=API_REVISIONS,
            version=self._identity.version,
            max_added_tokens=limits.max_added_tokens,
            numerics=limits.numerics,
        )

    async def WatchLoad(
        self, request: engine_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[engine_pb2.WatchLoadResponse]:
        """Stream the load: now, and after each change, at most once per interval."""
        interval_s = _seconds(request.min_interval) if request.HasField("min_interval") else DEFAULT_LOAD_INTERVAL_S
        if interval_s < 0:
            raise InvalidParameterError(f"min_interval {interval_s:g} s is negative", field="min_interval")
        last = -1
        while not self._is_closing.is_set():
            load = self._engine.snapshot()
            if load.sequence != last:
                last = load.sequence
                yield engine_pb2.WatchLoadResponse(load=wire.load_report(load))
            await self._pause(max(interval_s, MIN_LOAD_INTERVAL_S))

    async def ListAdapters(
        self, request: engine_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.ListAdaptersResponse:
        """Page through the adapters that the engine holds, by digest."""
        if request.page_size < 0:
            raise InvalidParameterError(f"page_size {request.page_size} is negative", field="page_size")
        after = check_digest(request.page_token, "page_token") if request.page_token else ""
        size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        statuses = await asyncio.wrap_future(self._engine.list_adapters())
        rest = [status for status in statuses if status.digest > after and _is_held(status)]
        return engine_pb2.ListAdaptersResponse(
            adapters=[_resident_adapter(status) for status in rest[:size]],
            next_page_token=rest[size - 1].digest if len(rest) > size else "",
            sequence=statuses[0].sequence if statuses else self._feed.sequence,
        )

    async def WatchAdapters(
        self, request: engine_pb2.WatchAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[engine_pb2.WatchAdaptersResponse]:
        """Stream residency changes."""
        position = request.start_sequence or self._feed.sequence
        while not self._is_closing.is_set():
            for event in self._feed.since(position):
                position = event.sequence
                yield engine_pb2.WatchAdaptersResponse(sequence=event.sequence, adapter=_resident_adapter(event))
            await self._until_closing(self._feed.wait_beyond(position))

    async def WatchPool(
        self, request: engine_pb2.WatchPoolRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[engine_pb2.WatchPoolResponse]:
        """Stream what becomes of the pool's pages."""
        interval = request.interval if request.HasField("interval") else None
        async for reading in self._pool.changes(interval, self._pause):
            yield reading

    async def PinAdapter(
        self, request: engine_pb2.PinAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.PinAdapterResponse:
        """Keep an adapter in the pool."""
        status = await _settled(self._engine.pin(check_digest(request.digest, "digest")))
        return engine_pb2.PinAdapterResponse(adapter=_resident_adapter(status))

    async def UnpinAdapter(
        self, request: engine_pb2.UnpinAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.UnpinAdapterResponse:
        """Make an adapter evictable again."""
        status = await _settled(self._engine.unpin(check_digest(request.digest, "digest")))
        return engine_pb2.UnpinAdapterResponse(adapter=_resident_adapter(status))

    async def EvictAdapter(
        self, request: engine_pb2.EvictAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.EvictAdapterResponse:
        """Free an adapter's pages once it has no lease."""
        generation = request.require_generation if request.HasField("require_generation") else None
        status = await _settled(self._engine.evict(check_digest(request.digest, "digest"), generation))
        return engine_pb2.EvictAdapterResponse(adapter=_resident_adapter(status))

    async def Drain(
        self, request: engine_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.DrainResponse:
        """Stop admission, and end the requests that have not finished by the deadline."""
        timeout_s = _seconds(request.deadline) if request.HasField("deadline") else DEFAULT_DRAIN_S
        if timeout_s < 0:
            raise InvalidParameterError(f"deadline {timeout_s:g} s is negative", field="deadline")
        return engine_pb2.DrainResponse(num_ended=await self._draining.drain(timeout_s))

    async def Undrain(
        self, request: engine_pb2.UndrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.UndrainResponse:
        """Take requests again."""
        return engine_pb2.UndrainResponse(was_draining=await self._draining.undrain())

    async def _pause(self, seconds: float) -> bool:
        """Wait; returns False once streams are to end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_closing.wait()
        return not self._is_closing.is_set()

    async def _until_closing(self, waiting: Any) -> None:
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._is_closing.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()


def _draining() -> DrainingError:
    return DrainingError("the engine is shutting down", drop_reason="rejected-shutting-down")


async def _settled(future: Future[AdapterStatus]) -> AdapterStatus:
    return await asyncio.wrap_future(future)


def _seconds(value: Duration) -> float:
    return float(value.seconds + value.nanos * 1e-9)


def _is_held(status: AdapterStatus) -> bool:
    return status.state not in (ResidencyState.ABSENT, ResidencyState.WANTED)


def _resident_adapter(news: AdapterStatus | ResidencyChanged) -> engine_pb2.ResidentAdapter:
    """Return an adapter's status, or what has become of it, on the wire; only a status says for how long it is idle."""
    return engine_pb2.ResidentAdapter(
        digest=news.digest,
        tier=wire.tier(news.state),
        state=wire.resident_state(news.state),
        num_pages=news.num_pages,
        pinned=news.is_pinned,
        num_leases=news.num_leases,
        generation=news.generation,
        idle=wire.duration(news.idle_s) if isinstance(news, AdapterStatus) else None,
        max_rank=news.max_rank,
    )
