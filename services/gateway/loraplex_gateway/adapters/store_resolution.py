"""The adapter store's part in finding adapters that requests name by their source."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import grpc
from loraplex.v1 import adapter_store_pb2, adapter_store_pb2_grpc
from loraplex_common.errors import DrainingError, LoraplexError, NotSupportedError, StoreUnavailableError
from loraplex_common.rpc_errors import error_from_rpc

if TYPE_CHECKING:
    from loraplex_common.peers import PeerChannel

IMPORT_S: Final = 900.0
"""Longest time in which a source is imported; its requests have deadlines of their own."""
STORE_AWAY_S: Final = 10.0
"""How long another replica of the store is looked for when one goes away."""
PAUSE_S: Final = 0.25


async def resolved_by_store(
    channel: PeerChannel | None, text: str, tenant: str
) -> adapter_store_pb2.ResolveAdapterResponse:
    """Return the store's answer; a replica that goes away meanwhile is replaced by another one.

    Args:
        channel: To the adapter store; None without one.
        text: The source.
        tenant: The tenant whose request names it.

    Raises:
        NotSupportedError: If there is no store, or none that resolves sources.
        StoreUnavailableError: If it cannot be reached.
        LoraplexError: What it refuses the source with.
    """
    if channel is None:
        raise NotSupportedError("this gateway has no adapter store (--store-target): it serves base models alone")
    request = adapter_store_pb2.ResolveAdapterRequest(source=text, tenant=tenant)
    give_up_at = time.monotonic() + STORE_AWAY_S
    while True:
        try:
            async with channel.use() as open_channel:
                stub: adapter_store_pb2_grpc.AdapterStoreServiceAsyncStub
                stub = adapter_store_pb2_grpc.AdapterStoreServiceStub(open_channel)
                return await stub.ResolveAdapter(request, timeout=IMPORT_S)
        except grpc.aio.AioRpcError as failure:
            error = _error(text, failure)
            if not _is_away(error) or time.monotonic() >= give_up_at:
                raise error from failure
        await asyncio.sleep(PAUSE_S)


def _is_away(error: LoraplexError) -> bool:
    return isinstance(error, DrainingError) or (isinstance(error, StoreUnavailableError) and "away" in error.metadata)


def _error(text: str, failure: grpc.aio.AioRpcError) -> LoraplexError:
    """Return the error behind a failed call; without a status of the store's own, what the failure means here."""
    error = error_from_rpc(failure)
    # A store that ends cancels its calls; nothing else does.
    if error.reason in (grpc.StatusCode.UNAVAILABLE.name, grpc.StatusCode.CANCELLED.name):
        message = f"adapter {text!r} cannot be resolved: the adapter store cannot be reached"
        return StoreUnavailableError(message, retry_after_s=1.0, metadata={"adapter": text, "away": "true"})
    if error.reason == grpc.StatusCode.UNIMPLEMENTED.name:
        return NotSupportedError("the adapter store is of an earlier version and resolves no sources: update it")
    return error
