"""Turns gRPC's failures into the errors that the servers raised, and says where they came from."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

import grpc
from loraplex_common.errors import LoraplexError, RemoteError
from loraplex_common.rpc_errors import error_from_rpc

if TYPE_CHECKING:
    from collections.abc import Iterator


def loraplex_error(error: grpc.RpcError, target: str) -> LoraplexError:
    """Return the error behind a failed call; an unreachable server is named."""
    # The blocking API raises the call itself, which has the same accessors.
    result = error_from_rpc(cast("grpc.aio.AioRpcError", error))
    # gRPC's own status, without a reason of ours, means that no server answered.
    if isinstance(result, RemoteError) and result.reason == grpc.StatusCode.UNAVAILABLE.name:
        return RemoteError(
            f"cannot reach {target}: {result.message}",
            code=result.code,
            reason=result.reason,
            http_status=result.http_status,
            retry_after_s=result.retry_after_s,
        )
    return result


@contextlib.contextmanager
def translated(target: str) -> Iterator[None]:
    """Raise `LoraplexError` for a gRPC failure inside the block."""
    try:
        yield
    except grpc.RpcError as error:
        raise loraplex_error(error, target) from error
