"""What operators do to single engines: take them out of service and back. It takes the role admin where keys are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex.v1 import engine_pb2, engine_pb2_grpc

from loraplex_client._errors import translated
from loraplex_client._requests import duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_client._connection import Connection

MARGIN_S = 10.0
"""For the answer, beyond the time that a drain may take."""
TIMEOUT_S = 30.0


class AsyncEngines:
    """Engines by their address, ``host:port``; `fleet_status` and ``loraplex status`` name them.

    Args:
        reach: Returns how an engine at an address is reached.
    """

    def __init__(self, reach: Callable[[str], Connection]) -> None:
        self._reach = reach

    async def drain(self, target: str, *, deadline_s: float = 30.0) -> int:
        """Have an engine refuse new requests, and wait until the others have finished.

        Args:
            target: The engine, ``host:port``.
            deadline_s: When requests that still run are ended; a gateway continues them elsewhere.

        Returns:
            How many were.

        Raises:
            ConflictError: If `undrain` has ended the drain.
            LoraplexError: If the engine cannot be reached or does not let the caller do this.
        """
        connection = self._reach(target)
        request = engine_pb2.DrainRequest(deadline=duration(deadline_s))
        async with connection.open_aio() as channel:
            stub: engine_pb2_grpc.EngineServiceAsyncStub = engine_pb2_grpc.EngineServiceStub(channel)
            with translated(target):
                answer = await stub.Drain(request, timeout=deadline_s + MARGIN_S, metadata=connection.metadata)
        return answer.num_ended

    async def undrain(self, target: str) -> bool:
        """Have an engine take requests again, whether a drain is under way or over; return whether there was one.

        Raises:
            DrainingError: If the engine drains because its process ends.
            LoraplexError: If the engine cannot be reached or does not let the caller do this.
        """
        connection = self._reach(target)
        async with connection.open_aio() as channel:
            stub: engine_pb2_grpc.EngineServiceAsyncStub = engine_pb2_grpc.EngineServiceStub(channel)
            with translated(target):
                request = engine_pb2.UndrainRequest()
                answer = await stub.Undrain(request, timeout=TIMEOUT_S, metadata=connection.metadata)
        return answer.was_draining
