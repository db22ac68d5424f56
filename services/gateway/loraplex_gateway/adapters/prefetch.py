"""Hints to the adapter store that an engine will need an adapter. Advisory: nothing waits for them or fails by them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from loraplex_common.peers import PeerChannel

# Long enough to spare the store a burst's repetitions, short enough to repeat a hint that was lost.
REPEAT_AFTER_S: Final = 2.0
MAX_OUTSTANDING: Final = 64
RPC_TIMEOUT_S: Final = 2.0

_log = get_logger()


class PrefetchHints:
    """Sends each (adapter, engine) hint at most once every `REPEAT_AFTER_S` seconds.

    Args:
        channel: To the adapter store.
        clock: Monotonic seconds.
    """

    def __init__(self, channel: PeerChannel, *, clock: Callable[[], float]) -> None:
        self._channel = channel
        self._clock = clock
        self._sent_at: dict[tuple[str, str], float] = {}
        self._outstanding: set[asyncio.Task[None]] = set()

    def hint(self, digest: str, engine_id: str) -> None:
        """Say that an engine will need an adapter soon; returns at once."""
        now = self._clock()
        if now - self._sent_at.get((digest, engine_id), -REPEAT_AFTER_S) < REPEAT_AFTER_S:
            return
        if len(self._outstanding) >= MAX_OUTSTANDING:
            return
        if len(self._sent_at) > 4096:
            self._sent_at = {key: at for key, at in self._sent_at.items() if now - at < REPEAT_AFTER_S}
        self._sent_at[digest, engine_id] = now
        task = asyncio.create_task(self._send(digest, engine_id), name="prefetch-hint")
        self._outstanding.add(task)
        task.add_done_callback(self._outstanding.discard)

    def hint_missing(self, digests: Iterable[str], resident: Collection[str], engine_id: str) -> None:
        """Say that an engine will need those of some adapters that it does not hold; returns at once."""
        for digest in digests:
            if digest not in resident:
                self.hint(digest, engine_id)

    async def close(self) -> None:
        """Drop the hints that are on their way."""
        for task in tuple(self._outstanding):
            task.cancel()
        await asyncio.gather(*self._outstanding, return_exceptions=True)

    async def _send(self, digest: str, engine_id: str) -> None:
        request = adapter_store_pb2.PrefetchAdapterRequest(revision=digest, engine_id=engine_id)
        try:
            async with self._channel.use() as channel:
                stub: adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub
                stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
                await stub.PrefetchAdapter(request, timeout=RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            _log.debug("prefetch hint lost", digest=digest, engine_id=engine_id, cause=error.details())
