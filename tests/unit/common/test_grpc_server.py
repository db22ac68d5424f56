"""Our server over a real loopback connection: errors, deadlines, cancellation, health, drain, credentials."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loraplex_common import errors
from loraplex_common.auth import Authenticator, Tenant, current_tenant
from loraplex_common.grpc_channel import open_channel
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_common.rpc_metrics import RpcMetrics
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
SERVICE = "test.v1.EchoService"
TIMEOUT_S = 20.0

Context = Any


class Echo:
    """A service with one RPC of each shape, whose behaviour a test chooses; messages are strings."""

    def __init__(self) -> None:
        self.unary: Callable[[str, Context], Awaitable[str]] = self._echo
        self.stream: Callable[[str, Context], AsyncIterator[str]] = self._letters
        self.released = asyncio.Event()

    async def _echo(self, text: str, _context: Context) -> str:
        return text

    async def _letters(self, text: str, _context: Context) -> AsyncIterator[str]:
        for letter in text:
            yield letter

    async def wait_forever(self, _text: str, _context: Context) -> str:
        try:
            return str(await asyncio.Event().wait())
        finally:
            self.released.set()

    async def drip_forever(self, _text: str, _context: Context) -> AsyncIterator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            self.released.set()

    async def flood(self, _text: str, _context: Context) -> AsyncIterator[str]:
        try:
            while True:
                yield "x" * 65536
        finally:
            self.released.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        async def once(request: StringValue, context: Context) -> StringValue:
            return StringValue(value=await self.unary(request.value, context))

        async def stream(request: StringValue, context: Context) -> AsyncIterator[StringValue]:
            async for text in self.stream(request.value, context):
                yield StringValue(value=text)

        async def join(requests: AsyncIterator[StringValue], context: Context) -> StringValue:
            return StringValue(value="".join([await self.unary(r.value, context) async for r in requests]))

        async def chat(requests: AsyncIterator[StringValue], context: Context) -> AsyncIterator[StringValue]:
            async for request in requests:
                yield StringValue(value=await self.unary(request.value, context))

        codec: dict[str, Any] = {
            "request_deserializer": StringValue.FromString,
            "response_serializer": StringValue.SerializeToString,
        }
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Once": grpc.unary_unary_rpc_method_handler(once, **codec),
                "Stream": grpc.unary_stream_rpc_method_handler(stream, **codec),
                "Join": grpc.stream_unary_rpc_method_handler(join, **codec),
                "Chat": grpc.stream_stream_rpc_method_handler(chat, **codec),
            },
        )


class EchoClient:
    """Calls the four RPCs with text, or with raw bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        codec: dict[str, Any] = {
            "request_serializer": lambda text: text if isinstance(text, bytes) else StringValue(value=text).SerializeToString(),
            "response_deserializer": lambda data: StringValue.FromString(data).value,
        }  # fmt: skip
        self.once: Any = channel.unary_unary(f"/{SERVICE}/Once", **codec)
        self.stream: Any = channel.unary_stream(f"/{SERVICE}/Stream", **codec)
        self.join: Any = channel.stream_unary(f"/{SERVICE}/Join", **codec)
        self.chat: Any = channel.stream_stream(f"/{SERVICE}/Chat", **codec)


@asynccontextmanager
async def running(
    echo: Echo, config: ServerConfig | None = None, **options: Any
) -> AsyncIterator[tuple[GrpcServer, str]]:
    server = GrpcServer(config or ServerConfig(), **options)
    server.server.add_generic_rpc_handlers([echo.handlers()])
    server.add_service_name(SERVICE)
    port = await server.start()
    server.set_ready(True)
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.drain(settle_s=0, grace_s=0)


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def target(echo: Echo) -> AsyncIterator[str]:
    async with running(echo) as (_, address):
        yield address


@pytest.fixture
async def client(target: str) -> AsyncIterator[EchoClient]:
    async with open_channel(target) as channel:
        yield EchoClient(channel)


async def failure(call: Awaitable[Any]) -> errors.LoraplexError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, TIMEOUT_S)
    return error_from_rpc(caught.value)


async def collect(call: AsyncIterator[str]) -> list[str]:
    return [text async for text in call]


async def texts(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        yield value


async def test_all_four_shapes_of_call_work(client: EchoClient) -> None:
    assert await client.once("hi") == "hi"
    assert await collect(client.stream("abc")) == ["a", "b", "c"]
    assert await client.join(texts("a", "b")) == "ab"
    assert await collect(client.chat(texts("a", "b"))) == ["a", "b"]


def raising(error: Exception) -> Callable[[str, Context], Awaitable[str]]:
    async def behave(_text: str, _context: Context) -> str:
        raise error

    return behave


async def test_an_error_arrives_with_all_its_details(echo: Echo, client: EchoClient) -> None:
    echo.unary = raising(
        errors.SaturatedError("full", retry_after_s=1.5, metadata={"queued": "9"}, drop_reason="rejected-saturated")
    )

    error = await failure(client.once("x"))

    assert isinstance(error, errors.SaturatedError)
    assert (error.message, error.retry_after_s, error.metadata) == ("full", 1.5, {"queued": "9"})
    assert error.drop_reason == "rejected-saturated"


async def test_retry_advice_is_repeated_as_pushback(echo: Echo, client: EchoClient) -> None:
    echo.unary = raising(errors.SaturatedError("full", retry_after_s=1.5))

    call = client.once("x")

    assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("shape", ["once", "join", "chat"])
async def test_errors_arrive_from_every_shape_of_call(echo: Echo, client: EchoClient, shape: str) -> None:
    echo.unary = raising(errors.AdapterNotFoundError("no adapter 'x'"))
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "once": lambda: client.once("x"),
        "join": lambda: client.join(texts("x")),
        "chat": lambda: collect(client.chat(texts("x"))),
    }

    assert isinstance(await failure(calls[shape]()), errors.AdapterNotFoundError)


async def test_an_error_after_messages_ends_the_stream_behind_them(echo: Echo, client: EchoClient) -> None:
    async def behave(_text: str, _context: Context) -> AsyncIterator[str]:
        yield "a"
        raise errors.StreamInterruptedError("engine died", metadata={"resume_token": "t"})

    echo.stream = behave
    got: list[str] = []

    async def read() -> None:
        async for text in client.stream("x"):
            got.append(text)

    error = await failure(read())

    assert got == ["a"]
    assert isinstance(error, errors.StreamInterruptedError)
    assert error.metadata == {"resume_token": "t"}


async def test_trailers_a_handler_set_survive_an_error(echo: Echo, client: EchoClient) -> None:
    async def behave(_text: str, context: Context) -> str:
        context.set_trailing_metadata((("x-engine", "e-1"),))
        raise errors.NoEngineError("none")

    echo.unary = behave

    assert dict(await client.once("x").trailing_metadata())["x-engine"] == "e-1"


async def test_an_unexpected_exception_is_internal_and_tells_nothing_but_an_id(echo: Echo, client: EchoClient) -> None:
    echo.unary = raising(KeyError("secret detail"))

    with capture_logs() as logs:
        error = await failure(client.once("x"))

    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in error.message
    assert [log["error_id"] for log in logs if log["log_level"] == "error"] == [error.metadata["error_id"]]


async def test_a_huge_message_still_arrives_as_the_right_error(echo: Echo, client: EchoClient) -> None:
    echo.unary = raising(errors.InvalidParameterError("\u00e4" * 100_000, field="adapter"))

    assert isinstance(await failure(client.once("x")), errors.InvalidParameterError)


@pytest.mark.parametrize("data", [b"\x0a\x02\xff\xfe", b"\x0a\x7fshort", b"\xff" * 100])
@pytest.mark.parametrize("shape", ["once", "stream", "join", "chat"])
async def test_undecodable_bytes_are_the_callers_fault(client: EchoClient, shape: str, data: bytes) -> None:
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "once": lambda: client.once(data),
        "stream": lambda: collect(client.stream(data)),
        "join": lambda: client.join(texts("a", data)),
        "chat": lambda: collect(client.chat(texts("a", data))),
    }

    error = await failure(calls[shape]())

    assert isinstance(error, errors.InvalidParameterError)
    assert "not a valid message" in error.message


async def test_an_unknown_method_is_unimplemented(target: str) -> None:
    async with open_channel(target) as channel:
        nothing: Any = channel.unary_unary(f"/{SERVICE}/Nothing")
        error = await failure(nothing(b""))

    assert error.code is grpc.StatusCode.UNIMPLEMENTED


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


async def test_an_unreachable_server_is_a_remote_error_to_retry_elsewhere() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        error = await failure(EchoClient(channel).once("x"))

    assert (error.code, error.http_status) == (grpc.StatusCode.UNAVAILABLE, 503)


@pytest.mark.parametrize(
    ("service", "error", "expected"),
    [
        ("GatewayService", errors.NoEngineError("none"), 3),
        ("AdapterStoreService", errors.DrainingError("going"), 3),
        ("GatewayService", errors.SaturatedError("full", retry_after_s=0.01), 1),
        ("GatewayService", errors.AdapterLoadingError("on its way", retry_after_s=0.01), 1),
        ("EngineService", errors.DrainingError("going"), 1),
    ],
)
async def test_channels_retry_only_what_is_unavailable(
    service: str, error: errors.LoraplexError, expected: int
) -> None:
    num_attempts = 0

    async def refuse(_request: bytes, _context: Context) -> bytes:
        nonlocal num_attempts
        num_attempts += 1
        raise error

    server = GrpcServer(ServerConfig())
    handlers: dict[str, Any] = {"Do": grpc.unary_unary_rpc_method_handler(refuse)}
    server.server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(f"loraplex.v1.{service}", handlers)])
    async with open_channel(f"127.0.0.1:{await server.start()}") as channel:
        do: Any = channel.unary_unary(f"/loraplex.v1.{service}/Do")

        assert type(await failure(do(b""))) is type(error)

    assert num_attempts == expected
    await server.drain(settle_s=0, grace_s=0)


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


async def test_two_servers_on_one_port_are_refused(target: str, echo: Echo) -> None:
    second = GrpcServer(ServerConfig(port=int(target.rpartition(":")[2])))

    with pytest.raises(OSError, match="cannot listen on"):
        await second.start()
    await second.server.stop(None)


KEYS = {"key-a": Tenant(name="acme"), "key-root": Tenant(name="ops", is_admin=True)}


async def tell_tenant(_text: str, _context: Context) -> str:
    tenant = current_tenant()
    return f"{tenant.name} {tenant.is_admin}"


async def tell_tenants(_text: str, _context: Context) -> AsyncIterator[str]:
    yield current_tenant().name
    await asyncio.sleep(0)
    yield current_tenant().name


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


async def test_reflection_lists_services_where_it_is_on(echo: Echo) -> None:
    async with (
        running(echo, ServerConfig(enable_reflection=True)) as (_, target),
        open_channel(target) as channel,
    ):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")

        answer = await stub.ServerReflectionInfo(texts(request)).read()

    assert SERVICE in [service.name for service in answer.list_services_response.service]


@pytest.mark.parametrize("options", [{"tls_cert": Path("c")}, {"tls_key": Path("k")}, {"tls_client_ca": Path("ca")}])
def test_half_a_tls_configuration_is_refused(options: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="tls_cert"):
        ServerConfig(**options)  # type: ignore[arg-type]
