"""What counts against quotas, and that they hold: streams that resume, clients and gateways that go, Valkey away."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.errors import NoEngineError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_gateway.quotas import accounts as quota_accounts
from loraplex_gateway.quotas.script import LEASE_S
from support.cut_streams import NUM_TOKENS, Cut, long_text, read_up_to, rest_of
from support.gateway_rig import model_directory, running_gateway, text_request
from support.processes import ServiceProcess
from support.quota_rig import Once, caller, is_now, limited, outcome, refusal, written
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Valkey is there, take no busy machine for its absence."""
    if "valkey_url" in request.fixturenames:
        monkeypatch.setattr(quota_accounts, "TIMEOUT_S", 10.0)


async def test_places_of_clients_that_go_away_are_free_again_on_every_gateway(valkey_url: str, tmp_path: Path) -> None:
    quotas = "[tenants.acme]\nmax_concurrent_requests = 2\n"
    async with limited(valkey_url, tmp_path, quotas) as one, limited(valkey_url, tmp_path, quotas) as two:
        for rig in (one, two):
            for engine in rig.engines:
                engine.hold_at = 2
        async with caller(one) as a, caller(two) as b:
            running = [stub.Generate(text_request()) for stub in (a, b)]
            for stream in running:
                first: Any = await stream.read()
                assert first.HasField("started")
            error = await refusal(b.GenerateOnce(Once(request=text_request())))
            assert error.retry_after_s == 1.0
            assert error.exceeded[0].description == "2 may be under way at once; 2 are, and this call is 1"

            for stream in running:
                stream.cancel()
            for rig in (one, two):
                for engine in rig.engines:
                    engine.release()

            await eventually(lambda: is_now(b, "OK"), timeout_s=5.0)


async def test_places_of_a_gateway_that_is_killed_are_free_within_seconds(valkey_url: str, tmp_path: Path) -> None:
    quotas = "[default]\nmax_concurrent_requests = 2\n"
    async with running_gateway(valkey_url, quotas_file=written(tmp_path, quotas)) as rig:
        rig.engine.hold_at = 2
        arguments = ["--model", str(model_directory()), "--redis-url", valkey_url, "--port", "0", "--http-port", "0"]
        killed = ServiceProcess(
            "loraplex_gateway", [*arguments, "--quotas-file", str(tmp_path / "quotas.toml")], log_dir=tmp_path
        )
        try:
            await asyncio.to_thread(killed.wait_ready)
            async with open_channel(killed.grpc) as channel:
                stub = gateway_pb2_grpc.GatewayServiceStub(channel)
                streams = [stub.Generate(text_request()) for _ in range(2)]
                for stream in streams:
                    first: Any = await stream.read()
                    assert first.HasField("started")
                assert await outcome(rig.stub) == "TENANT_QUOTA"
                killed.kill()
                killed_at = time.monotonic()
                rig.engine.release()

                await eventually(lambda: is_now(rig.stub, "OK"), timeout_s=15.0)

                assert time.monotonic() - killed_at < 3 * LEASE_S
        finally:
            killed.kill()


async def test_a_changed_file_holds_for_the_next_request_and_a_broken_one_does_not(
    valkey_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "quotas.toml"

    def rewrite(text: str) -> None:
        following = tmp_path / "quotas.next"
        following.write_text(text)
        os.replace(following, file)

    async with limited(valkey_url, tmp_path, "[default]\nrequests_per_minute = 0\n") as rig, caller(rig) as stub:
        assert await outcome(stub) == "TENANT_QUOTA"
        rewrite("[tenants.rival]\nrequests_per_minute = 0\n")
        await eventually(lambda: is_now(stub, "OK"), timeout_s=5.0)
        rewrite("[default]\nrequests_per_minutes = 0\n")
        await asyncio.sleep(1.5)  # longer than the file is not looked at
        assert await outcome(stub) == "OK"


async def test_streams_go_on_and_limits_hold_while_valkey_is_away(tmp_path: Path) -> None:
    quotas = "[default]\nrequests_per_minute = 4\n"
    with running_server(tmp_path / "valkey") as server:
        async with limited(server.url, tmp_path, quotas) as rig, caller(rig) as stub:
            await stub.GenerateOnce(Once(request=text_request()))
            server.kill()

            began = time.monotonic()
            outcomes = [await outcome(stub) for _ in range(6)]

            assert outcomes == ["OK"] * 3 + ["TENANT_QUOTA"] * 3
            assert time.monotonic() - began < 10 * quota_accounts.TIMEOUT_S
            server.start()


async def test_without_limits_valkey_hears_nothing_of_quotas(valkey_url: str, tmp_path: Path) -> None:
    async with limited(valkey_url, tmp_path, "[tenants.rival]\nrequests_per_minute = 5\n") as rig, caller(rig) as stub:
        call = stub.GenerateOnce(Once(request=text_request()))
        await call

        assert not [key for key, _ in await call.trailing_metadata() or () if key.startswith("x-ratelimit")]
        keys: Any = await rig.valkey.keys("loraplex:quotas:*")
        assert keys == []


async def test_what_never_started_costs_no_tokens(valkey_url: str, tmp_path: Path) -> None:
    async with limited(valkey_url, tmp_path, "[default]\ntokens_per_minute = 300\n") as rig, caller(rig) as stub:
        rig.engine.refuse = NoEngineError("not now")
        for _ in range(4):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GenerateOnce(
                    Once(request=text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=200))), timeout=2
                )
            assert error_from_rpc(caught.value).reason != "TENANT_QUOTA"


async def test_what_an_engine_reads_again_for_a_resumed_stream_counts_again(valkey_url: str, tmp_path: Path) -> None:
    """Or tokens would be free that a client says it has had: whole prompts, as often as it likes."""
    async with limited(valkey_url, tmp_path, "[default]\ntokens_per_minute = 100\n") as rig, caller(rig) as stub:
        call = stub.Generate(long_text())
        got = await read_up_to(call, long_text(), 1)
        call.cancel()
        await eventually(lambda: rig.app.claims.num_running == 0)
        resumed = got.resumed(token_ids=[30] * (NUM_TOKENS - 1), last_sequence=0, num_text_bytes=NUM_TOKENS - 1)

        answers: list[str] = []
        for _ in range(100 // NUM_TOKENS):
            try:
                await rest_of(stub.Generate(resumed, timeout=20))
            except grpc.aio.AioRpcError as error:
                answers.append(error_from_rpc(error).reason)
            else:
                answers.append("OK")

        assert answers[0] == "OK"
        assert answers[-1] == "TENANT_QUOTA"


async def test_the_end_of_a_stream_that_had_ended_costs_no_tokens(valkey_url: str, tmp_path: Path) -> None:
    async with limited(valkey_url, tmp_path, "[default]\ntokens_per_minute = 100\n") as rig, caller(rig) as stub:
        got = Cut(long_text(), [])
        async for response in stub.Generate(got.request):
            got.responses.append(response)
        got.responses.pop()

        for _ in range(10):
            assert (await rest_of(stub.Generate(got.resumed(), timeout=20)))[-1].HasField("finished")
