"""An engine double that takes so many steps a second, and writes down when it sent each token."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING

from loraplex.v1 import engine_pb2_grpc
from loraplex_common import valkey
from loraplex_common.base_model import load_base_model
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from support.engine_double import EngineDouble, servicer_of
from support.gateway_rig import letters

from loraplex_bench.streams.shared_number import SharedNumber

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex.v1 import engine_pb2

MAX_MODEL_LEN = 100_000
REGISTER_EVERY_S = 10.0


class PacedEngine(EngineDouble):
    """Every running request gets a token each step, of which there are `pace` a second, above 0.

    The requests that a gateway takes back are written to `log`, a JSON line each: the id, and when each token was sent in
    microseconds of the monotonic clock.
    """

    pace: SharedNumber
    log: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sent: dict[str, list[int]] = {}

    async def session(
        self, requests: AsyncIterator[engine_pb2.SessionRequest]
    ) -> AsyncIterator[engine_pb2.SessionResponse]:
        """Run one session."""
        times: dict[int, list[int]] = {}  # of the request in each slot

        async def noted() -> AsyncIterator[engine_pb2.SessionRequest]:
            async for request in requests:
                for submit in request.submits:
                    times[submit.slot] = self._sent[submit.request_id] = []
                yield request

        due = time.monotonic()
        async for message in super().session(noted()):
            if message.token_ids:
                due = await self._paced(due)
                now = round(1e6 * time.monotonic())
                for slot in message.token_slots:
                    times[slot].append(now)
            yield message
            self._write_down()

    async def _paced(self, due: float) -> float:
        """Wait for the next step's time and return it; an engine that is late does not make up for it in a burst."""
        rate, now = self.pace.get(), time.monotonic()
        due = max(due + 1 / rate, now - 1 / rate)
        if due > now:
            await asyncio.sleep(due - now)
        return due

    def _write_down(self) -> None:
        self.submits.clear()
        if not self.aborted_ids:
            return
        with self.log.open("a") as file:
            for request_id in self.aborted_ids:
                file.write(json.dumps([request_id, self._sent.pop(request_id, [])]) + "\n")
        self.aborted_ids.clear()


async def run_engine(model: Path, folder: Path, name: str) -> None:
    """Be an engine until killed; `folder` has its pace and its log."""
    double = PacedEngine(base=load_base_model(model), reply=letters, max_model_len=MAX_MODEL_LEN)
    double.pace, double.log = SharedNumber(folder / "pace"), folder / f"{name}.log"
    server = GrpcServer(ServerConfig())
    engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer_of(double), server.server)
    double.port = await server.start()
    client = valkey.connect(os.environ["LORAPLEX_GATEWAY_REDIS_URL"])
    while True:
        await double.register(client)
        await asyncio.sleep(REGISTER_EVERY_S)
