"""Keeps the name table equal to the adapter store's, over every loss of connection."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

import grpc
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from loraplex_common.log import get_logger

from loraplex_gateway.names import AdapterEntry

if TYPE_CHECKING:
    from loraplex_gateway.names import NameTable

FIRST_BACKOFF_S: Final = 0.2
MAX_BACKOFF_S: Final = 5.0

_log = get_logger()


class AliasWatcher:
    """Follows `AdapterStoreService.WatchAliases`.

    Every connection starts with the whole table: it is small, and no lost event can outlive a reconnect.

    Args:
        channel: To the adapter store.
        table: What is kept up to date; it stays as it is while the store is away.
    """

    def __init__(self, channel: grpc.aio.Channel, table: NameTable) -> None:
        self._stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(channel)
        self._table = table
        self._backoff_s = FIRST_BACKOFF_S

    async def run(self) -> None:
        """Follow the store for ever."""
        while True:
            try:
                await self._follow()
            except grpc.aio.AioRpcError as error:
                _log.warning("lost the adapter store; names stay as last known", cause=error.details())
            await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1.0))
            self._backoff_s = min(self._backoff_s * 2, MAX_BACKOFF_S)

    async def _follow(self) -> None:
        staged: list[AdapterEntry] | None = None
        request = adapter_store_pb2.WatchAliasesRequest(start_sequence=0)
        async for response in self._stub.WatchAliases(request, wait_for_ready=True):
            self._backoff_s = FIRST_BACKOFF_S
            entries = [_entry(entry) for entry in response.entries]
            if response.snapshot_start:
                staged = []
            if staged is None:
                self._table.update(entries)
                continue
            staged += entries
            if response.snapshot_end:
                self._table.replace_all(staged)
                _log.info("received the name table", num_adapters=len(staged), sequence=response.sequence)
                staged = None


def _entry(entry: adapter_store_pb2.WatchAliasesResponse.Entry) -> AdapterEntry:
    return AdapterEntry(
        name=entry.name,
        labels={alias.label: alias.revision for alias in entry.aliases},
        base_fingerprints={revision.revision: revision.base_fingerprint for revision in entry.revisions},
        allowed_tenants=frozenset(entry.allowed_tenants),
        is_deleted=entry.deleted,
    )
