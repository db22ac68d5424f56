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


class Engines:
    """Engines by their address, ``host:port``; `fleet_status` and ``loraplex status`` name them.

    Args:
        reach: Returns how an engine at an address is reached.
    """

    def __init__(self, reach: Callable[[str], Connection]) -> None:
        self._reach = reach

    def drain(self, target: str, *, deadline_s: float = 30.0) -> int:
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
        connection, request = self._reach(target), _drain_request(deadline_s)
        with connection.open() as channel, translated(target):
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            answer = stub.Drain(request, timeout=deadline_s + MARGIN_S, metadata=connection.metadata)
        return answer.num_ended

    def undrain(self, target: str) -> bool:
        """Have an engine take requests again, whether a drain is under way or over; return whether there was one.

        Raises:
            DrainingError: If the engine drains because its process ends.
            LoraplexError: If the engine cannot be reached or does not let the caller do this.
        """
        connection = self._reach(target)
        with connection.open() as channel, translated(target):
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            answer = stub.Undrain(engine_pb2.UndrainRequest(), timeout=TIMEOUT_S, metadata=connection.metadata)
        return answer.was_draining


def _drain_request(deadline_s: float) -> engine_pb2.DrainRequest:
    return engine_pb2.DrainRequest(deadline=duration(deadline_s))
