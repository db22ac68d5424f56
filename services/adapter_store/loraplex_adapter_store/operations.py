"""google.longrunning.Operations: the progress of imports (AIP-151)."""

from __future__ import annotations

from typing import Any

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.empty_pb2 import Empty
from loraplex_common.errors import InvalidParameterError

from loraplex_adapter_store import paging
from loraplex_adapter_store.imports.long_running import PREFIX, LongRunning

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
        """Page through operations."""
        if request.filter:
            raise InvalidParameterError("filters are not served", field="filter")
        operations, following = await self._operations.page(
            page_size=paging.page_size(request.page_size), after=paging.decode(request.page_token)
        )
        return operations_pb2.ListOperationsResponse(operations=operations, next_page_token=paging.encode(following))


def _operation_id(name: str) -> str:
    if not name.startswith(PREFIX) or not name.removeprefix(PREFIX).isalnum():
        raise InvalidParameterError(f"{name[:80]!r} is no operation: {PREFIX}ID", field="name")
    return name.removeprefix(PREFIX)
