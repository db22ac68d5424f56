"""The gRPC health service (grpc.health.v1).

The servicer in grpcio-health-checking forgets every watcher of a service when one of them leaves, and setting a state
there is a coroutine. This servicer is a table and a wake-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME

from loraplex_common.errors import RemoteError
from loraplex_common.health_list import HealthListRequest, HealthListResponse
from loraplex_common.wake_up import WakeUp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Answers health checks and watches from a table of service names."""

    def __init__(self) -> None:
        self._states: dict[str, bool] = {}
        self._changed = WakeUp()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve it; ``List`` by hand, as the library's function adds only the calls that it knows."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)
        method = grpc.unary_unary_rpc_method_handler(
            self.List,
            request_deserializer=HealthListRequest.FromString,
            response_serializer=HealthListResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"List": method}),))

    def set(self, service: str, *, is_serving: bool) -> None:
        """Record a service's state and tell its watchers."""
        self._states[service] = is_serving
        self._changed.notify()

    def _status(self, service: str) -> int:
        if service not in self._states:
            return int(_UNKNOWN)
        return int(_SERVING if self._states[service] else _NOT_SERVING)

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """Return a service's state; NOT_FOUND for a name this server does not have."""
        status = self._status(request.service)
        if status == _UNKNOWN:
            raise RemoteError(
                f"no service {request.service!r} here",
                code=grpc.StatusCode.NOT_FOUND,
                reason="SERVICE_NOT_FOUND",
                http_status=404,
            )
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802
        self, request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Any:
        """Return the state of every service."""
        response = HealthListResponse()
        for name in self._states:
            response.statuses[name].status = self._status(name)
        return response

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Stream a service's state: now, and after each change."""
        last: int | None = None
        while True:
            changed, status = self._changed.next, self._status(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            else:
                await changed.wait()
