"""What our server says of its health, and how it drains."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex_common import errors
from loraplex_common.grpc_channel import open_channel
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from loraplex_common.health_list import HealthListRequest, HealthListResponse
from support.echo_service import SERVICE, TIMEOUT_S, Context, Echo, EchoClient, failure, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_health_follows_readiness_while_liveness_stays() -> None:
    server = GrpcServer(ServerConfig())
    server.add_service_name(SERVICE)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def states() -> dict[str, int]:
            names = ("", "liveness", "readiness", SERVICE)
            return {name: (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names}

        assert await states() == {"": NOT_SERVING, "liveness": SERVING, "readiness": NOT_SERVING, SERVICE: NOT_SERVING}
        server.set_ready(True)
        assert set((await states()).values()) == {SERVING}
        server.set_ready(False)
        assert await states() == {"": NOT_SERVING, "liveness": SERVING, "readiness": NOT_SERVING, SERVICE: NOT_SERVING}
    await server.drain(settle_s=0, grace_s=0)


async def test_health_of_an_unknown_service_is_not_found(target: str) -> None:
    async with open_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        error = await failure(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
        first = await stub.Watch(health_pb2.HealthCheckRequest(service="nobody")).read()

    assert error.code is grpc.StatusCode.NOT_FOUND
    assert first.status == UNKNOWN


async def test_a_list_has_the_state_of_every_name() -> None:
    server = GrpcServer(ServerConfig())
    server.add_service_name(SERVICE)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        listed = channel.unary_unary(
            "/grpc.health.v1.Health/List",
            request_serializer=HealthListRequest.SerializeToString,
            response_deserializer=HealthListResponse.FromString,
        )

        async def states() -> dict[str, int]:
            response = await listed(HealthListRequest())
            return {name: each.status for name, each in response.statuses.items()}

        assert await states() == {"": NOT_SERVING, "liveness": SERVING, "readiness": NOT_SERVING, SERVICE: NOT_SERVING}
        server.set_ready(True)
        assert await states() == dict.fromkeys(("", "liveness", "readiness", SERVICE), SERVING)
    await server.drain(settle_s=0, grace_s=0)


def test_a_list_is_on_the_wire_what_the_public_proto_says() -> None:
    """Field 1 is a map: an entry has the name as field 1 and a HealthCheckResponse as field 2."""
    response = HealthListResponse()
    response.statuses["x"].status = SERVING

    assert response.SerializeToString() == b"\x0a\x07" + b"\x0a\x01x" + b"\x12\x02\x08\x01"
    assert HealthListRequest().SerializeToString() == b""


async def test_one_watcher_leaving_does_not_silence_the_other(echo: Echo) -> None:
    async with running(echo) as (server, target), open_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        left, right = (stub.Watch(health_pb2.HealthCheckRequest(service="")) for _ in range(2))
        assert [(await left.read()).status, (await right.read()).status] == [SERVING, SERVING]

        left.cancel()
        server.set_ready(False)

        assert (await asyncio.wait_for(right.read(), TIMEOUT_S)).status == NOT_SERVING


async def test_drain_lets_running_calls_finish_and_refuses_new_ones(echo: Echo) -> None:
    release = asyncio.Event()

    async def behave(text: str, _context: Context) -> AsyncIterator[str]:
        yield text
        await release.wait()
        yield "end"

    echo.stream = behave
    async with running(echo) as (server, target), open_channel(target) as channel:
        client = EchoClient(channel)
        call = client.stream("x")
        assert await call.read() == "x"
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
        assert (await watch.read()).status == SERVING

        draining = asyncio.create_task(server.drain(settle_s=0, grace_s=TIMEOUT_S))
        assert (await asyncio.wait_for(watch.read(), TIMEOUT_S)).status == NOT_SERVING
        server.set_ready(True)  # a late report of readiness must not undo the drain
        error = await failure(client.once("new"))
        liveness = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="liveness"))
        release.set()

        assert isinstance(error, errors.DrainingError)
        assert error.drop_reason == "rejected-shutting-down"
        assert liveness.status == SERVING
        assert await call.read() == "end"
        assert await call.read() is grpc.aio.EOF
        await asyncio.wait_for(draining, TIMEOUT_S / 2)  # the health watch does not hold it up


async def test_drain_ends_calls_that_outlast_the_grace(echo: Echo) -> None:
    echo.stream = echo.drip_forever
    async with running(echo) as (server, target), open_channel(target) as channel:
        call = EchoClient(channel).stream("x")
        await call.read()

        await asyncio.wait_for(server.drain(settle_s=0, grace_s=0.05), TIMEOUT_S)

        await asyncio.wait_for(echo.released.wait(), TIMEOUT_S)
