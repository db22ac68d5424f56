"""Errors of handlers, of callers and of the way between them, as a client of our server sees them."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex_common import errors
from loraplex_common.grpc_channel import open_channel
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from structlog.testing import capture_logs
from support.echo_service import SERVICE, Context, Echo, EchoClient, collect, failure, raising, running, texts
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


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


class Held:
    """Stands for a request of megabytes."""


async def test_what_a_failed_call_held_is_free_without_the_garbage_collector() -> None:
    held: list[weakref.ref[Held]] = []

    async def fail(_text: str, _context: Context) -> str:
        request = Held()
        held.append(weakref.ref(request))
        raise errors.ContextLengthError("too long")

    echo = Echo()
    echo.unary = fail
    gc.disable()
    try:
        async with running(echo) as (_, target), open_channel(target) as channel:
            await failure(EchoClient(channel).once("x"))
            await eventually(lambda: held[0]() is None, what="gone")
    finally:
        gc.enable()


async def test_the_message_of_a_served_call_is_free_without_the_garbage_collector() -> None:
    num_bytes, num_calls = 2 * 2**20, 24
    async with running(Echo()) as (_, target), open_channel(target) as channel:
        client, text = EchoClient(channel), "x" * num_bytes
        await client.once(text)
        gc.collect()
        gc.disable()
        try:
            before = resident_bytes()
            for _ in range(num_calls):
                await client.once(text)
            assert resident_bytes() - before < num_bytes * num_calls / 2
        finally:
            gc.enable()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
