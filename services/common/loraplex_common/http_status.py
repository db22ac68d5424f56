"""HTTP statuses for gRPC codes that come without one of our errors: from gRPC itself, a proxy, a newer peer."""

from __future__ import annotations

from typing import Final

import grpc

# OpenAI's clients send a request again for 408, 409, 429 and from 500 on: only for what may pass are these right.
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
    """Return the HTTP status of a gRPC code; 500 for those that are nobody's fault but the server's."""
    return _BY_CODE.get(code, 500)
