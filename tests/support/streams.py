"""Reading gRPC streams in tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from loraplex_common.rpc_errors import error_from_rpc

if TYPE_CHECKING:
    from loraplex.v1 import gateway_pb2


async def rest(call: Any) -> list[gateway_pb2.GenerateResponse]:
    """Read a stream to its end; grpc.aio does not let a call be read and iterated."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def failure_of(call: Any) -> Exception:
    """Read a stream to the error it ends with."""
    try:
        await rest(call)
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    raise AssertionError("the stream ended well")
