"""google.longrunning.Operations: the progress of imports (AIP-151)."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any, Final

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from loraplex_common.errors import InvalidParameterError

from loraplex_adapter_store import paging
from loraplex_adapter_store.imports.long_running import PREFIX, LongRunning

_FILTER: Final = re.compile(r'create_time *>= *"([0-9TZ:.+-]{20,40})"')
Context = grpc.aio.ServicerContext[Any, Any]


class OperationsServicer(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]
    """The RPCs on operations."""

    def __init__(self, operations: LongRunning) -> None:
        self._operations = operations

    async def GetOperation(
        self, request: operations_pb2.GetOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """Return an operation in its present state."""
        return await self._operations.get(_operation_id(request.name))

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: Context
    ) -> operations_pb2.Operation:
        """Return an operation once it has finished, or its present state after the timeout."""
        timeout_s = request.timeout.ToMilliseconds() / 1000 if request.HasField("timeout") else None
        return await self._operations.wait(_operation_id(request.name), timeout_s)

    async def CancelOperation(self, request: operations_pb2.CancelOperationRequest, context: Context) -> Empty:
        """Ask an operation to stop."""
        await self._operations.cancel(_operation_id(request.name))
        return Empty()

    async def DeleteOperation(self, request: operations_pb2.DeleteOperationRequest, context: Context) -> Empty:
        """Forget a finished operation."""
        await self._operations.delete(_operation_id(request.name))
        return Empty()

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: Context
    ) -> operations_pb2.ListOperationsResponse:
        """Page through operations; with a filter, return the newest of those that began since its time."""
        if request.name not in ("", PREFIX.rstrip("/")):
            raise InvalidParameterError(f"{request.name[:80]!r} has no operations of its own", field="name")
        if request.filter and request.page_token:
            raise InvalidParameterError("a filter's list has one page: ask for more by page_size", field="page_token")
        if request.filter:
            newest = await self._operations.newest(
                since=_since(request.filter), num_most=paging.page_size(request.page_size)
            )
            return operations_pb2.ListOperationsResponse(operations=newest)
        operations, following = await self._operations.page(
            page_size=paging.page_size(request.page_size), after=paging.decode(request.page_token)
        )
        return operations_pb2.ListOperationsResponse(operations=operations, next_page_token=paging.encode(following))


def _since(text: str) -> float:
    """Return the time that a filter names, in seconds since the epoch.

    Raises:
        InvalidParameterError: If it is another filter.
    """
    found = _FILTER.fullmatch(text)
    if found is not None:
        time = Timestamp()
        with suppress(ValueError):
            time.FromJsonString(found[1])
            return time.ToNanoseconds() * 1e-9
    raise InvalidParameterError(
        f'{text[:80]!r} is no filter that is served: create_time >= "2026-01-31T12:00:00Z"', field="filter"
    )


def _operation_id(name: str) -> str:
    if not name.startswith(PREFIX) or not name.removeprefix(PREFIX).isalnum():
        raise InvalidParameterError(f"{name[:80]!r} is no operation: {PREFIX}ID", field="name")
    return name.removeprefix(PREFIX)
