"""Follows the page pool of one engine, again and again, and keeps what is known of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc
from loraplex.v1 import engine_pb2, engine_pb2_grpc, fleet_pb2
from loraplex_common.error_status import to_status
from loraplex_common.errors import DrainingError, LoraplexError, NotSupportedError
from loraplex_common.pool_view import PoolView
from loraplex_common.reconnect import keep_connected
from loraplex_common.rpc_errors import error_from_rpc

from loraplex_gateway.fleet.news import News

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.adapter_names import AdapterNames
    from loraplex_common.registry import EngineRecord

FIRST_PAUSE_S: Final = 0.2
MAX_PAUSE_S: Final = 5.0
TIMEOUT_S: Final = 5.0
SILENCE_S: Final = 5.0
"""An engine tells something each second; one that is silent for so long has lost the connection."""


class EngineWatch:
    """Watches one engine until its task is cancelled.

    Args:
        record: The engine.
        names: The adapters' names.
        dial: Opens a channel to its address.
        tell: Gets all news.
        passed_over: Tells why an engine gets no new requests.

    Attributes:
        task: Does the work.
    """

    def __init__(
        self,
        record: EngineRecord,
        names: AdapterNames,
        *,
        dial: Callable[[str], grpc.aio.Channel],
        tell: Callable[[News], None],
        passed_over: Callable[[EngineRecord], str],
    ) -> None:
        self._record, self._names = record, names
        self._dial, self._tell, self._passed_over = dial, tell, passed_over
        self._view: PoolView | None = None
        self._info = engine_pb2.GetEngineInfoResponse()
        self._load = engine_pb2.LoadReport()
        self._error: LoraplexError | None = None
        self.task = asyncio.create_task(self._run(), name=f"pool-watch-{record.engine_id}")

    @property
    def is_known(self) -> bool:
        """Whether it is known how the engine fares: it has told, or cannot be reached."""
        return self._view is not None or self._error is not None

    async def snapshot(self) -> News:
        """Return all that is known now, in turns of the event loop; `is_known` says whether that is anything."""
        message = self._message()
        if self._view is None:
            return self._failed(message)
        message.info.CopyFrom(self._info)
        message.load.CopyFrom(self._load)
        message.change.CopyFrom(self._view.snapshot())
        await asyncio.sleep(0)
        return News(self._filled(message))

    def farewell(self) -> News:
        """Return that the engine is gone."""
        message = self._message()
        message.gone = True
        return News(message)

    async def _run(self) -> None:
        await keep_connected(self._hold, first_pause_s=FIRST_PAUSE_S, max_pause_s=MAX_PAUSE_S)

    async def _hold(self) -> bool:
        """Follow the engine over one connection; returns whether it ever answered."""
        has_answered = False
        try:
            async with self._dial(self._record.target) as channel:
                stub: engine_pb2_grpc.EngineServiceAsyncStub = engine_pb2_grpc.EngineServiceStub(channel)
                self._info = await stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), timeout=TIMEOUT_S)
                responses = aiter(stub.WatchPool(engine_pb2.WatchPoolRequest()))
                while True:
                    async with asyncio.timeout(SILENCE_S):
                        response = await anext(responses)
                    has_answered = True
                    self._heard(response)
        except StopAsyncIteration:
            self._lost(DrainingError("the engine has ended its stream"))
        except ValueError as error:
            self._lost(LoraplexError(f"the engine broke the protocol: {error}"))
        except TimeoutError:
            self._lost(LoraplexError(f"nothing was heard for {SILENCE_S:g} s"))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                self._lost(NotSupportedError("this engine's version does not show its pool"))
            else:
                self._lost(error_from_rpc(error))
        except LoraplexError as error:
            self._lost(error)
        return has_answered

    def _heard(self, response: engine_pb2.WatchPoolResponse) -> None:
        message = self._message()
        if self._view is None or response.change.snapshot:
            self._view = PoolView()
            message.info.CopyFrom(self._info)
        self._view.apply(response.change)
        self._load = response.load
        message.load.CopyFrom(response.load)
        message.change.CopyFrom(response.change)
        self._tell(News(self._filled(message)))

    def _lost(self, error: LoraplexError) -> None:
        self._view, self._error = None, error
        self._tell(self._failed(self._message()))

    def _failed(self, message: fleet_pb2.WatchFleetResponse) -> News:
        assert self._error is not None
        message.error.CopyFrom(to_status(self._error))
        return News(message)

    def _message(self) -> fleet_pb2.WatchFleetResponse:
        return fleet_pb2.WatchFleetResponse(engine_id=self._record.engine_id, target=self._record.target)

    def _filled(self, message: fleet_pb2.WatchFleetResponse) -> fleet_pb2.WatchFleetResponse:
        """Add to a message with a change what the gateway knows of it."""
        message.passed_over = self._passed_over(self._record)
        digests = {held.adapter.digest for held in message.change.adapters}
        digests.update(digest for request in message.change.requests for digest in request.adapter_digests)
        found = {digest: names[0] for digest in digests if (names := self._names.of(digest))}
        message.MergeFrom(fleet_pb2.WatchFleetResponse(adapter_names=found))  # one by one takes five times as long
        return message
