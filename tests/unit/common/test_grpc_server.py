"""Our server over a real loopback connection: calls, deadlines, cancellation, credentials, metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex_common import errors
from loraplex_common.auth import Authenticator, Principal, Role, current_principal
from loraplex_common.grpc_channel import open_channel
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from loraplex_common.rpc_metrics import RpcMetrics
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs
from support import reflected
from support.echo_service import (
    SERVICE,
    TIMEOUT_S,
    Context,
    Echo,
    EchoClient,
    collect,
    failure,
    raising,
    running,
    texts,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVING = health_pb2.HealthCheckResponse.SERVING


async def test_all_four_shapes_of_call_work(client: EchoClient) -> None:
    assert await client.once("hi") == "hi"
    assert await collect(client.stream("abc")) == ["a", "b", "c"]
    assert await client.join(texts("a", "b")) == "ab"
    assert await collect(client.chat(texts("a", "b"))) == ["a", "b"]


async def test_a_caller_may_bring_all_the_baggage_and_trace_state_that_w3c_allows(client: EchoClient) -> None:
    context = (("baggage", "k=" + "v" * 8190), ("tracestate", "k=" + "v" * 510))

    assert await asyncio.gather(*(client.once("hi", metadata=context) for _ in range(50))) == ["hi"] * 50


async def test_a_passed_deadline_releases_the_handler(echo: Echo, client: EchoClient) -> None:
    echo.unary = echo.wait_forever

    error = await failure(client.once("x", timeout=0.2))

    assert isinstance(error, errors.DeadlineError)
    await asyncio.wait_for(echo.released.wait(), TIMEOUT_S)


async def test_cancelling_a_stream_closes_the_handlers_generator(echo: Echo, client: EchoClient) -> None:
    echo.stream = echo.drip_forever
    call = client.stream("x")
    assert await call.read() == "first"

    call.cancel()

    await asyncio.wait_for(echo.released.wait(), TIMEOUT_S)


async def test_a_vanishing_client_closes_the_handlers_generator(echo: Echo, target: str) -> None:
    echo.stream = echo.flood
    channel = open_channel(target)
    await EchoClient(channel).stream("x").read()

    with capture_logs() as logs:
        await channel.close()
        await asyncio.wait_for(echo.released.wait(), TIMEOUT_S)

    assert not [log for log in logs if log["log_level"] == "error"]


async def test_two_servers_on_one_port_are_refused(target: str, echo: Echo) -> None:
    second = GrpcServer(ServerConfig(port=int(target.rpartition(":")[2])))

    with pytest.raises(OSError, match="cannot listen on"):
        await second.start()
    await second.server.stop(None)


KEYS = {"key-a": Principal(name="acme"), "key-root": Principal(name="ops", role=Role.ADMIN)}


async def tell_tenant(_text: str, _context: Context) -> str:
    tenant = current_principal()
    return f"{tenant.name} {tenant.is_admin}"


async def tell_tenants(_text: str, _context: Context) -> AsyncIterator[str]:
    yield current_principal().name
    await asyncio.sleep(0)
    yield current_principal().name


@pytest.mark.parametrize(("key", "expected"), [("key-a", "acme False"), ("key-root", "ops True")])
async def test_the_api_key_names_the_tenant_in_every_shape_of_call(echo: Echo, key: str, expected: str) -> None:
    echo.unary, echo.stream = tell_tenant, tell_tenants
    async with (
        running(echo, authenticator=Authenticator(KEYS)) as (_, target),
        open_channel(target, api_key=key) as channel,
    ):
        client = EchoClient(channel)

        assert await client.once("x") == expected
        assert await client.join(texts("x")) == expected
        assert await collect(client.chat(texts("x"))) == [expected]
        assert await collect(client.stream("x")) == [expected.split()[0]] * 2


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_calls_without_a_known_key_are_unauthenticated(echo: Echo, key: str | None) -> None:
    async with (
        running(echo, authenticator=Authenticator(KEYS)) as (_, target),
        open_channel(target, api_key=key) as channel,
    ):
        error = await failure(EchoClient(channel).once("x"))
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    assert isinstance(error, errors.UnauthenticatedError)
    assert health.status == SERVING  # probes have no keys


async def test_without_configured_keys_everybody_is_the_default_tenant(echo: Echo, client: EchoClient) -> None:
    echo.unary = tell_tenant

    assert await client.once("x") == "default True"


async def test_metrics_count_calls_by_method_and_status(echo: Echo) -> None:
    registry = CollectorRegistry()
    async with running(echo, metrics=RpcMetrics(registry)) as (_, target), open_channel(target) as channel:
        client = EchoClient(channel)
        await client.once("x")
        echo.unary = raising(errors.AdapterNotFoundError("no"))
        await failure(client.once("x"))
        echo.unary = echo.wait_forever
        await failure(client.once("x", timeout=0.1))
        await asyncio.wait_for(echo.released.wait(), TIMEOUT_S)

    def count(status: str) -> float | None:
        labels = {"grpc_method": f"{SERVICE}/Once", "grpc_status": status}
        return registry.get_sample_value("grpc_server_call_duration_seconds_count", labels)

    assert registry.get_sample_value("grpc_server_call_started_total", {"grpc_method": f"{SERVICE}/Once"}) == 3
    assert (count("OK"), count("NOT_FOUND"), count("DEADLINE_EXCEEDED")) == (1, 1, 1)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_and_describes_services_under_both_of_its_names(echo: Echo, version: str) -> None:
    async with (
        running(echo, ServerConfig(enable_reflection=True)) as (_, target),
        open_channel(target) as channel,
    ):
        names = await reflected.list_services(channel, version)
        files = {name: await reflected.files_of(channel, version, name) for name in names if name != SERVICE}

    itself = {f"grpc.reflection.{version}.ServerReflection" for version in ("v1", "v1alpha")}
    assert names == {SERVICE, "grpc.health.v1.Health", *itself}
    for name, found in files.items():
        package, _, service = name.rpartition(".")
        assert any(file.package == package and service in [s.name for s in file.service] for file in found), name


async def test_reflection_is_off_unless_asked_for(echo: Echo) -> None:
    async with running(echo, ServerConfig()) as (_, target), open_channel(target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected.list_services(channel, "v1")

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("options", [{"tls_cert": Path("c")}, {"tls_key": Path("k")}, {"tls_client_ca": Path("ca")}])
def test_half_a_tls_configuration_is_refused(options: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="tls_cert"):
        ServerConfig(**options)  # type: ignore[arg-type]
