"""What a gateway shows of its engines."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from loraplex.v1 import engine_pb2, engine_pb2_grpc, fleet_pb2
from loraplex_common.adapter_names import AdapterNames
from loraplex_common.grpc_channel import open_channel
from loraplex_common.registry import EngineRecord
from loraplex_gateway.fleet.watch import FleetWatch
from loraplex_gateway.grpc.servicer_fleet import FleetServicer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_gateway.engines.pool import EnginePool

RECORD = EngineRecord(
    engine_id="engine-1",
    target="",
    base_model="tiny",
    base_fingerprint="f" * 64,
    max_model_len=128,
    vocab_size=300,
    num_pages=8,
    block_tokens=16,
    page_bytes=1024,
    max_image_pages=4,
)


class OneEngine(engine_pb2_grpc.EngineServiceServicer):
    """Holds three adapters, which it lists on pages of one."""

    async def GetEngineInfo(self, request: Any, context: Any) -> engine_pb2.GetEngineInfoResponse:  # noqa: N802
        return engine_pb2.GetEngineInfoResponse(engine_id="engine-1", backend="cuda")

    async def WatchLoad(self, request: Any, context: Any) -> AsyncIterator[engine_pb2.WatchLoadResponse]:  # noqa: N802
        yield engine_pb2.WatchLoadResponse(load=engine_pb2.LoadReport(running=5))
        await asyncio.Event().wait()

    async def ListAdapters(  # noqa: N802
        self, request: engine_pb2.ListAdaptersRequest, context: Any
    ) -> engine_pb2.ListAdaptersResponse:
        page = int(request.page_token or 0)
        held = engine_pb2.ResidentAdapter(digest=f"{page}" * 64)
        return engine_pb2.ListAdaptersResponse(adapters=[held], next_page_token=str(page + 1) if page < 2 else "")


@pytest.fixture
async def target() -> AsyncIterator[str]:
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServiceServicer_to_server(OneEngine(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def fleet(*targets: str) -> FleetServicer:
    links = [SimpleNamespace(record=replace(RECORD, target=target)) for target in targets]
    pool = cast("EnginePool", SimpleNamespace(links=links, passed_over=lambda _: ""))
    return FleetServicer(pool, FleetWatch(pool, AdapterNames(), open_channel))


async def listed(servicer: FleetServicer) -> dict[str, fleet_pb2.EngineState]:
    response = await servicer.ListEngines(fleet_pb2.ListEnginesRequest(), cast("Any", None))
    return {state.target: state for state in response.engines}


async def test_an_engine_is_shown_as_it_describes_itself(target: str) -> None:
    (state,) = (await listed(fleet(target))).values()

    assert (state.info.backend, state.load.running) == ("cuda", 5)
    assert [adapter.digest[0] for adapter in state.adapters] == ["0", "1", "2"]
    assert not state.HasField("error")


async def test_an_engine_that_does_not_answer_is_listed_with_the_reason_beside_the_others(target: str) -> None:
    states = await listed(fleet("127.0.0.1:1", target))

    assert states["127.0.0.1:1"].error.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert not states["127.0.0.1:1"].HasField("info")
    assert states[target].load.running == 5
