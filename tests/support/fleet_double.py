# ruff: noqa: N802 -- RPC names are CamelCase
"""A gateway's view of its engines that answers from a list."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from loraplex.v1 import fleet_pb2, fleet_pb2_grpc
from support.gateway_double import fail

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc
    from loraplex_common.errors import LoraplexError


class FleetDouble(fleet_pb2_grpc.FleetServiceServicer):
    """Lists `engines`, tells `news`, or fails with `failure`; what is `leaving` is listed the first time alone."""

    def __init__(self) -> None:
        self.engines: list[fleet_pb2.EngineState] = []
        self.leaving: list[fleet_pb2.EngineState] = []
        self.news: list[fleet_pb2.WatchFleetResponse] = []
        self.failure: LoraplexError | None = None

    def ListEngines(
        self, request: fleet_pb2.ListEnginesRequest, context: grpc.ServicerContext
    ) -> fleet_pb2.ListEnginesResponse:
        if self.failure is not None:
            fail(context, self.failure)
        leaving, self.leaving = self.leaving, []
        return fleet_pb2.ListEnginesResponse(engines=[*self.engines, *leaving])

    def WatchFleet(
        self, request: fleet_pb2.WatchFleetRequest, context: grpc.ServicerContext
    ) -> Iterator[fleet_pb2.WatchFleetResponse]:
        """Tell the news, then nothing more for as long as the caller listens."""
        if self.failure is not None:
            fail(context, self.failure)
        yield from self.news
        is_over = threading.Event()
        if context.add_callback(is_over.set):
            is_over.wait()
