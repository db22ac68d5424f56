"""`FleetService` over gRPC: asks the engines what they are, for callers that reach only the gateway."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
from loraplex.v1 import engine_pb2, engine_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from loraplex_common.error_status import to_status
from loraplex_common.errors import DrainingError, LoraplexError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from loraplex_common.registry import EngineRecord

    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.fleet.watch import FleetWatch

TIMEOUT_S: Final = 5.0


class FleetServicer(fleet_pb2_grpc.FleetServiceServicer):
    """Describes the engines of one gateway.

    Args:
        pool: Knows which there are.
        watch: Follows their page pools while there is a reader.
        dial: Opens a channel to an engine's address.
    """

    def __init__(
        self, pool: EnginePool, watch: FleetWatch, dial: Callable[[str], grpc.aio.Channel] = open_channel
    ) -> None:
        self._pool, self._watch = pool, watch
        self._dial = dial

    async def ListEngines(
        self, request: fleet_pb2.ListEnginesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.ListEnginesResponse:
        """Ask all engines at once; one that does not answer is listed with the reason."""
        records = sorted((link.record for link in self._pool.links), key=lambda record: record.target)
        return fleet_pb2.ListEnginesResponse(engines=await asyncio.gather(*map(self._state, records)))

    async def WatchFleet(
        self, request: fleet_pb2.WatchFleetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[fleet_pb2.WatchFleetResponse]:
        """Stream what becomes of the engines' page pools."""
        with self._watch.reading() as reader:
            while (found := await reader.take(TIMEOUT_S)) is not None:
                for news in found:
                    yield news.message
        raise DrainingError("the gateway is shutting down", drop_reason="rejected-shutting-down")

    async def _state(self, record: EngineRecord) -> fleet_pb2.EngineState:
        known = fleet_pb2.EngineState(
            engine_id=record.engine_id, target=record.target, passed_over=self._pool.passed_over(record)
        )
        state = fleet_pb2.EngineState()
        state.CopyFrom(known)
        try:
            async with self._dial(record.target) as channel:
                stub: engine_pb2_grpc.EngineServiceAsyncStub = engine_pb2_grpc.EngineServiceStub(channel)
                state.info.CopyFrom(await stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), timeout=TIMEOUT_S))
                state.load.CopyFrom(await _load(stub))
                state.adapters.extend(await _adapters(stub))
        except grpc.aio.AioRpcError as error:
            known.error.CopyFrom(to_status(error_from_rpc(error)))
            return known
        except LoraplexError as error:
            known.error.CopyFrom(to_status(error))
            return known
        return state


async def _load(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> engine_pb2.LoadReport:
    """Return the first reading of the load stream.

    Raises:
        DrainingError: If the engine ends it at once.
    """
    watch = stub.WatchLoad(engine_pb2.WatchLoadRequest(), timeout=TIMEOUT_S)
    async for reading in watch:
        watch.cancel()
        return reading.load
    raise DrainingError("the engine ends its load stream")


async def _adapters(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> list[engine_pb2.ResidentAdapter]:
    held: list[engine_pb2.ResidentAdapter] = []
    request = engine_pb2.ListAdaptersRequest()
    while True:
        page = await stub.ListAdapters(request, timeout=TIMEOUT_S)
        held.extend(page.adapters)
        if not page.next_page_token:
            return held
        request.page_token = page.next_page_token
