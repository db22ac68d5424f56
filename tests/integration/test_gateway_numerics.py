"""A request stays among engines that compute alike: of one base model, and of equal numerics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from loraplex.v1 import fleet_pb2, fleet_pb2_grpc, gateway_pb2
from loraplex_client import AsyncClient
from loraplex_common.errors import StreamInterruptedError
from loraplex_common.rpc_errors import error_from_rpc
from support.cut_streams import CUT, Cut, cut, long_text, read_all, read_up_to, refusal, rest_of
from support.gateway_rig import MODEL_NAME, letters, running_gateway, text_request
from support.waiting import eventually

if TYPE_CHECKING:
    from support.engine_double import EngineDouble
    from support.gateway_rig import Rig

pytestmark = pytest.mark.integration

FP8 = "bf16+fp8-w8a8-dynamic"


async def leave(rig: Rig, engine: EngineDouble) -> None:
    """Take an engine out of the registry and end its sessions, and wait until the gateway knows."""
    await engine.unregister(rig.valkey)
    await engine.kill()
    await eventually(lambda: engine.engine_id not in {link.engine_id for link in rig.app.pool.links})


def num_submits(rig: Rig) -> list[int]:
    return [len(engine.submits) for engine in rig.engines]


async def begun(rig: Rig) -> tuple[EngineDouble, Any, Cut]:
    """Begin a stream, and return the engine on which it waits in the middle of its output."""
    for engine in rig.engines:
        engine.hold_at = CUT
    call = rig.stub.Generate(long_text())
    got = await read_up_to(call, long_text(), CUT)
    (engine,) = (engine for engine in rig.engines if engine.engine_id == got.started.engine_id)
    return engine, call, got


async def test_requests_go_to_the_numerics_that_most_engines_have(valkey_url: str) -> None:
    async with running_gateway(valkey_url, numerics=[FP8, "bf16", "bf16"]) as rig:
        for _ in range(6):
            done = await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()), timeout=10)
            assert done.started.numerics == "bf16"

        assert num_submits(rig)[0] == 0
        fleet: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(rig.channel)
        states = await fleet.ListEngines(fleet_pb2.ListEnginesRequest(), timeout=10)
        over = {state.engine_id: state.passed_over for state in states.engines if state.passed_over}
        assert over == {
            rig.engines[0].engine_id: f"its numerics are {FP8}, those of most engines of its base model bf16"
        }
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(rig.metrics)).text
        assert f'is_used="false",model_name="{MODEL_NAME}",numerics="{FP8}"}} 1.0' in metrics
        assert f'is_used="true",model_name="{MODEL_NAME}",numerics="bf16"}} 2.0' in metrics


async def test_a_stream_whose_engine_dies_goes_on_where_numerics_are_equal_and_nowhere_else(valkey_url: str) -> None:
    async with running_gateway(valkey_url, numerics=["bf16", "bf16", FP8], failover_wait_s=0.2) as rig:
        first, call, got = await begun(rig)
        await leave(rig, first)
        for engine in rig.engines:
            engine.release()
        responses = [*got.responses, *await rest_of(call)]
        assert Cut(long_text(), responses).token_ids == list(letters(first.submits[0]))
        assert num_submits(rig) == [1, 1, 0]

        second, call, got = await begun(rig)
        rig.engines[2].release()
        await leave(rig, second)
        with pytest.raises(Exception) as caught:
            await rest_of(call)
        error = error_from_rpc(caught.value)  # type: ignore[arg-type]
        assert isinstance(error, StreamInterruptedError)
        assert f"it began with numerics bf16, the engines that are left have {FP8}" in error.message
        assert "--allow-mixed-numerics" in error.message
        assert error.metadata["numerics"] == "bf16"
        assert rig.engines[2].submits == []


async def test_a_broken_stream_is_resumed_where_numerics_are_equal_although_new_requests_go_elsewhere(
    valkey_url: str,
) -> None:
    async with running_gateway(valkey_url, numerics=["bf16", "bf16", FP8, FP8], failover_wait_s=0.2) as rig:
        got = await cut(rig, long_text())
        assert got.started.numerics == "bf16"
        (first,) = (engine for engine in rig.engines if engine.submits)
        await leave(rig, first)
        (second,) = (engine for engine in rig.engines if engine.numerics == "bf16" and engine is not first)

        new = await read_all(rig, text_request())
        assert new[0].started.numerics == FP8
        responses = await read_all(rig, got.resumed())
        assert responses[0].started.engine_id == second.engine_id
        assert Cut(long_text(), [*got.responses, *responses]).token_ids == list(letters(first.submits[0]))

        await leave(rig, second)
        error = await refusal(rig, got.resumed())
        assert isinstance(error, StreamInterruptedError)
        assert f"began with numerics bf16, the engines that are left have {FP8}" in error.message


async def test_where_the_operator_allows_it_requests_mix_and_streams_go_on(valkey_url: str) -> None:
    async with running_gateway(
        valkey_url, numerics=[FP8, "bf16", "bf16"], allow_mixed_numerics=True, failover_wait_s=0.2
    ) as rig:
        rig.engines[1].extra_load = rig.engines[2].extra_load = 100
        for engine in rig.engines:
            engine.notify()
        await eventually(lambda: sum(link.load >= 100 for link in rig.app.pool.links) == 2)
        first, call, got = await begun(rig)
        assert first is rig.engines[0]
        rig.engines[1].release()
        rig.engines[2].release()

        await leave(rig, first)
        responses = [*got.responses, *await rest_of(call)]

        assert Cut(long_text(), responses).token_ids == list(letters(rig.engines[0].submits[0]))


async def test_an_answer_says_the_numerics_over_grpc_and_http(valkey_url: str) -> None:
    async with running_gateway(valkey_url, numerics=[FP8]) as rig, httpx.AsyncClient() as http:
        for stream in (False, True):
            body = {"model": MODEL_NAME, "prompt": "Hi", "max_tokens": 2, "stream": stream}
            response = await http.post(f"{rig.http}/v1/completions", json=body)
            assert (response.status_code, response.headers["x-loraplex-numerics"]) == (200, FP8)
        refused = await http.post(f"{rig.http}/v1/completions", json={"model": "nothing", "prompt": "Hi"})
        assert "x-loraplex-numerics" not in refused.headers
        async with AsyncClient(f"127.0.0.1:{rig.app.grpc_port}") as client:
            events = [event async for event in client.generate(prompt="Hi", max_new_tokens=2)]
        assert [event.numerics for event in events if hasattr(event, "numerics")] == [FP8]
