"""Fetches what a revision brings besides weights from the adapter store, when a request needs it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

import grpc
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from loraplex_common import text_parts_wire
from loraplex_common.errors import AdapterNotFoundError, LoraplexError, StoreUnavailableError
from loraplex_common.log import get_logger
from loraplex_common.rpc_errors import error_from_rpc

if TYPE_CHECKING:
    from loraplex_common.peers import PeerChannel
    from loraplex_common.text_parts import TextParts

    from loraplex_gateway.adapters.names import ResolvedAdapter

FETCH_S: Final = 5.0
RETRY_S: Final = 1.0

_log = get_logger()


class TextPartsSource:
    """Asks the store once at a time for parts that several requests wait for; keeps nothing.

    Args:
        channel: To the adapter store.
    """

    def __init__(self, channel: PeerChannel) -> None:
        self._channel = channel
        self._fetching: dict[str, asyncio.Task[TextParts]] = {}

    async def get(self, adapter: ResolvedAdapter) -> TextParts:
        """Return the parts of a revision that has some.

        Raises:
            AdapterNotFoundError: If the revision has been deleted meanwhile.
            StoreUnavailableError: If the store does not answer within `FETCH_S`, or not with these parts.
        """
        task = self._fetching.get(adapter.text_parts)
        if task is None:
            task = asyncio.create_task(self._fetch(adapter), name="text-parts")
            self._fetching[adapter.text_parts] = task
            task.add_done_callback(partial(self._ended, adapter.text_parts))
        return await asyncio.shield(task)  # others may wait for it, too

    async def close(self) -> None:
        """Drop the calls that are on their way."""
        tasks = tuple(self._fetching.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, digest: str, task: asyncio.Task[TextParts]) -> None:
        del self._fetching[digest]
        if not task.cancelled():
            task.exception()  # every request that waited for it may be gone

    async def _fetch(self, adapter: ResolvedAdapter) -> TextParts:
        try:
            async with self._channel.use() as channel:
                stub: adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub
                stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
                request = adapter_store_pb2.GetTextPartsRequest(revision=adapter.digest)
                parts = text_parts_wire.from_message(await stub.GetTextParts(request, timeout=FETCH_S))
        except grpc.aio.AioRpcError as error:
            cause = error_from_rpc(error)
            if isinstance(cause, AdapterNotFoundError):
                raise cause from error
            raise _unavailable(adapter, cause) from error
        if parts.digest != adapter.text_parts:
            raise _unavailable(adapter, LoraplexError(f"it sent parts of digest {parts.digest}"))
        return parts


def _unavailable(adapter: ResolvedAdapter, cause: LoraplexError) -> StoreUnavailableError:
    _log.warning("text parts cannot be fetched", adapter=adapter.name, digest=adapter.digest, cause=cause.message)
    return StoreUnavailableError(
        f"adapter {adapter.name!r} brings texts of its own (chat template, defaults), which the adapter store does not give "
        f"now: {cause.message[:200]}",
        retry_after_s=RETRY_S,
    )
