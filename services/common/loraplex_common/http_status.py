"""HTTP statuses for gRPC codes that come without an error of ours: from gRPC itself, a proxy, a newer peer."""

from __future__ import annotations

from typing import Final

import grpc

# OpenAI's clients repeat a request after 408, 409, 429 and from 500 on, so these are only right for passing failures.
_BY_CODE: Final = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 400,
    grpc.StatusCode.UNAVAILABLE: 503,
}


def http_status(code: grpc.StatusCode) -> int:
    """Return the HTTP status of a gRPC code; 500 for codes that mean a fault of the server."""
    return _BY_CODE.get(code, 500)
