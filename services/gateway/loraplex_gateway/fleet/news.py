"""News of one engine, told to all that read."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.v1 import fleet_pb2


@dataclass(frozen=True, slots=True)
class News:
    """News of one engine.

    Attributes:
        message: What is told; must not be changed any more, since all readers get the same.
    """

    message: fleet_pb2.WatchFleetResponse
