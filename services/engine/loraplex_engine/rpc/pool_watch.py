"""Streams of the page pool's changes: all streams share a reading, and without a stream nothing is read."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex.v1 import engine_pb2
from loraplex_common.errors import InvalidParameterError
from loraplex_common.pool_view import PageCells, page_cells, put_runs

from loraplex_engine.loop.pool_reading import Phase
from loraplex_engine.rpc import wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from google.protobuf.duration_pb2 import Duration

    from loraplex_engine.loop.engine import Engine
    from loraplex_engine.loop.pool_reading import PoolReading, ReadAdapter, ReadRequest

DEFAULT_INTERVAL_S: Final = 1.0
MIN_INTERVAL_S: Final = 0.2
_PHASES: Final = {
    Phase.QUEUED: engine_pb2.PoolRequest.PHASE_QUEUED,
    Phase.LOADING: engine_pb2.PoolRequest.PHASE_LOADING,
    Phase.PREFILL: engine_pb2.PoolRequest.PHASE_PREFILL,
    Phase.DECODE: engine_pb2.PoolRequest.PHASE_DECODE,
}


class PoolWatch:
    """Reads an engine's pool for those that watch it.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()
        self._latest: PoolReading | None = None
        self._read_at = -DEFAULT_INTERVAL_S

    async def changes(
        self, interval: Duration | None, pause: Callable[[float], Awaitable[bool]]
    ) -> AsyncIterator[engine_pb2.WatchPoolResponse]:
        """Yield the pool, then its changes, one message per interval.

        Args:
            interval: Time between two messages; None for the default.
            pause: Waits for so many seconds; returns False once the stream is to end.

        Raises:
            InvalidParameterError: If the interval is too short.
        """
        interval_s = DEFAULT_INTERVAL_S if interval is None else interval.ToNanoseconds() * 1e-9
        if interval_s < MIN_INTERVAL_S:
            raise InvalidParameterError(
                f"interval {interval_s:g} s is shorter than {MIN_INTERVAL_S:g} s", field="interval"
            )
        changes = PoolChanges()
        is_open = True
        while is_open:
            reading = await self._reading(interval_s / 2)
            load = wire.load_report(self._engine.snapshot())
            yield engine_pb2.WatchPoolResponse(change=changes.since_last(reading), load=load)
            is_open = await pause(interval_s)

    async def _reading(self, max_age_s: float) -> PoolReading:
        """Return a reading that is not older; several that ask at once get the same."""
        async with self._lock:
            if self._latest is None or time.monotonic() - self._read_at > max_age_s:
                self._latest = await asyncio.wrap_future(self._engine.read_pool())
                self._read_at = time.monotonic()
            return self._latest


class PoolChanges:
    """Tells for one stream how a reading differs from the one before."""

    def __init__(self) -> None:
        self._cells: PageCells | None = None
        self._requests: dict[int, ReadRequest] = {}
        self._adapters: dict[str, ReadAdapter] = {}
        self._numbers: dict[str, int] = {}
        self._num_numbered = 0

    def since_last(self, reading: PoolReading) -> engine_pb2.PoolChange:
        """Return what has changed; for the first reading, all of it."""
        change = engine_pb2.PoolChange(
            requests_left_out=reading.num_requests - len(reading.requests),
            adapters_left_out=reading.num_adapters - len(reading.adapters),
        )
        if self._cells is None:
            change.snapshot, change.num_pages = True, len(reading.owners)
            self._cells = np.zeros(len(reading.owners), dtype=np.int64)
        self._put_adapters(change, reading)
        self._put_requests(change, reading)
        cells = page_cells(reading.owners, reading.holders(self._numbers))
        put_runs(change, cells, self._cells)
        self._cells = cells
        return change

    def _put_adapters(self, change: engine_pb2.PoolChange, reading: PoolReading) -> None:
        found = {adapter.digest: adapter for adapter in reading.adapters}
        for digest in self._adapters.keys() - found.keys():
            change.gone_adapters.append(self._numbers.pop(digest))
        for digest, adapter in found.items():
            before = self._adapters.get(digest)
            if digest not in self._numbers:
                self._num_numbered += 1
                self._numbers[digest] = self._num_numbered
            if before is None or _told_of(adapter) != _told_of(before):
                told = change.adapters.add(holder=self._numbers[digest], requests_per_s=adapter.per_s)
                told.half_life.FromNanoseconds(round(reading.half_life_s * 1e9))
                told.adapter.CopyFrom(_resident(adapter))
        self._adapters = found

    def _put_requests(self, change: engine_pb2.PoolChange, reading: PoolReading) -> None:
        found = {request.number: request for request in reading.requests}
        change.ended_requests.extend(number + 1 for number in self._requests.keys() - found.keys())
        for number, request in found.items():
            before = self._requests.get(number)
            if before is None or before.phase is not request.phase:
                change.requests.append(_request(request))
            elif _progress(before) != _progress(request):
                computed, outputs, pages = _progress(request)
                change.progress_holders.append(number + 1)
                change.progress_computed.append(computed)
                change.progress_outputs.append(outputs)
                change.progress_pages.append(pages)
        self._requests = found


def _progress(request: ReadRequest) -> tuple[int, int, int]:
    return request.num_computed, request.num_outputs, request.num_pages


def _request(request: ReadRequest) -> engine_pb2.PoolRequest:
    return engine_pb2.PoolRequest(
        holder=request.number + 1,
        request_id=request.request_id,
        phase=_PHASES[request.phase],
        adapter_digests=request.digests,
        fairness_key=request.fairness_key,
        prompt_tokens=request.num_prompt,
        computed_tokens=request.num_computed,
        output_tokens=request.num_outputs,
        num_pages=request.num_pages,
        age=wire.duration(max(0.0, request.age_s)),
    )


def _told_of(adapter: ReadAdapter) -> tuple[object, ...]:
    """Return what a stream is told of an adapter anew when it changes; how often it is asked for fades by itself."""
    return (
        adapter.state,
        len(adapter.pages),
        adapter.is_pinned,
        adapter.num_leases,
        adapter.generation,
        adapter.octaves,
    )


def _resident(adapter: ReadAdapter) -> engine_pb2.ResidentAdapter:
    return engine_pb2.ResidentAdapter(
        digest=adapter.digest,
        tier=wire.tier(adapter.state),
        state=wire.resident_state(adapter.state),
        num_pages=len(adapter.pages),
        pinned=adapter.is_pinned,
        num_leases=adapter.num_leases,
        generation=adapter.generation,
        max_rank=adapter.max_rank,
    )
