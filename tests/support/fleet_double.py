# ruff: noqa: N802 -- RPC names are CamelCase
"""A gateway's view of its engines that answers from a list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex.v1 import fleet_pb2, fleet_pb2_grpc
from support.gateway_double import fail

if TYPE_CHECKING:
    import grpc
    from loraplex_common.errors import LoraplexError


class FleetDouble(fleet_pb2_grpc.FleetServiceServicer):
    """Lists `engines`, or fails with `failure`."""

    def __init__(self) -> None:
        self.engines: list[fleet_pb2.EngineState] = []
        self.failure: LoraplexError | None = None

    def ListEngines(
        self, request: fleet_pb2.ListEnginesRequest, context: grpc.ServicerContext
    ) -> fleet_pb2.ListEnginesResponse:
        if self.failure is not None:
            fail(context, self.failure)
        return fleet_pb2.ListEnginesResponse(engines=self.engines)
