"""A page pool that an engine double tells of: adapters and requests that a test puts there, no pages computed by anything."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from loraplex.v1 import engine_pb2
from support.engine_double import SessionServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from support.engine_double import EngineDouble
    from support.gateway_rig import Rig

READING_S: Final = 0.2


class PoolDouble:
    """The pool of one engine; each adapter and each request has a page.

    Attributes:
        model: Name of the base model, as the engine says it.
        left_out: Requests and adapters that it only counts.
        num_pages: Size of the pool.
    """

    def __init__(self, num_pages: int = 64) -> None:
        self.model = "tiny"
        self.left_out = (0, 0)
        self.num_pages = num_pages
        self._adapters: dict[str, int] = {}
        self._requests: dict[str, engine_pb2.PoolRequest] = {}
        self._num_holders = 0

    def hold(self, digest: str) -> None:
        """Have an adapter on the device."""
        self._num_holders += 1
        self._adapters[digest] = self._num_holders

    def drop(self, digest: str) -> None:
        """Let an adapter leave the device."""
        del self._adapters[digest]

    def open(
        self,
        request_id: str,
        *,
        whose: str = "",
        adapters: Sequence[str] = (),
        phase: engine_pb2.PoolRequest.Phase.ValueType = engine_pb2.PoolRequest.PHASE_DECODE,
    ) -> None:
        """Have a request under way."""
        self._num_holders += 1
        self._requests[request_id] = engine_pb2.PoolRequest(
            holder=self._num_holders,
            request_id=request_id,
            phase=phase,
            adapter_digests=adapters,
            fairness_key=whose,
            num_pages=1,
        )

    def change(self) -> engine_pb2.PoolChange:
        """Return all of it."""
        change = engine_pb2.PoolChange(
            snapshot=True,
            num_pages=self.num_pages,
            requests_left_out=self.left_out[0],
            adapters_left_out=self.left_out[1],
            requests=self._requests.values(),
        )
        for digest, holder in self._adapters.items():
            held = engine_pb2.ResidentAdapter(digest=digest, num_pages=1, max_rank=8)
            change.adapters.add(holder=holder, requests_per_s=1.0 / holder, adapter=held)
        owned = [(engine_pb2.PAGE_OWNER_ADAPTER, holder) for holder in self._adapters.values()]
        owned += [(engine_pb2.PAGE_OWNER_KV, request.holder) for request in self._requests.values()]
        for page, (owner, holder) in enumerate(owned[: self.num_pages]):
            change.run_starts.append(page)
            change.run_lengths.append(1)
            change.run_owners.append(owner)
            change.run_holders.append(holder)
        return change


class _Servicer(SessionServicer):
    def __init__(self, engine: EngineDouble, pool: PoolDouble) -> None:
        super().__init__(engine)
        self._pool = pool

    async def GetEngineInfo(  # noqa: N802
        self, request: engine_pb2.GetEngineInfoRequest, context: Any
    ) -> engine_pb2.GetEngineInfoResponse:
        response = engine_pb2.GetEngineInfoResponse(backend="double", numerics="bf16")
        response.base_model.name = self._pool.model
        return response

    async def WatchPool(  # noqa: N802
        self, request: engine_pb2.WatchPoolRequest, context: Any
    ) -> AsyncIterator[engine_pb2.WatchPoolResponse]:
        load = engine_pb2.LoadReport(running=1, tokens_per_s=10.0)
        while True:
            yield engine_pb2.WatchPoolResponse(change=self._pool.change(), load=load)
            await asyncio.sleep(READING_S)


@asynccontextmanager
async def telling(rig: Rig, pools: Sequence[PoolDouble]) -> AsyncIterator[None]:
    """Have the engines of a rig tell of these pools during the block; only their addresses are the rig's doubles'."""
    for engine, pool in zip(rig.engines, pools, strict=True):
        port = engine.port
        await engine.kill()
        engine.servicer = _Servicer(engine, pool)  # type: ignore[abstract]
        await engine.start(port)
    yield
