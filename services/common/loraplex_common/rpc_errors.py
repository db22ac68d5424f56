"""Turns a failed call to a peer back into the error that the peer raised."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.rpc import status_pb2

from loraplex_common.error_status import from_status
from loraplex_common.errors import CancelledRequestError, DeadlineError, LoraplexError, RemoteError
from loraplex_common.http_status import http_status
from loraplex_common.interceptors import DROP_REASON_KEY

_DETAILS_KEY: Final = "grpc-status-details-bin"


def error_from_rpc(error: grpc.aio.AioRpcError) -> LoraplexError:
    """Return the error behind a failed call.

    A rich status gives the class that the peer raised. A bare status (connection refused, deadline, proxy) gives a
    `DeadlineError`, a `CancelledRequestError` or a `RemoteError` with gRPC's code as its reason.
    """
    metadata: dict[str, Any] = dict(error.trailing_metadata() or ())
    if _DETAILS_KEY in metadata:
        status = status_pb2.Status.FromString(metadata[_DETAILS_KEY])
        if status.details:
            result = from_status(status)
            result.drop_reason = metadata.get(DROP_REASON_KEY)
            return result
    code, message = error.code(), error.details() or error.code().name
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(message)
    if code is grpc.StatusCode.CANCELLED:
        return CancelledRequestError(message)
    return RemoteError(message, code=code, reason=code.name, http_status=http_status(code))
