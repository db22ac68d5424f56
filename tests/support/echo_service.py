"""A gRPC service with one RPC of each shape behind our server; tests choose its behaviour. Also its client."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from loraplex_common.auth import Role
from loraplex_common.grpc_server import GrpcServer, ServerConfig
from loraplex_common.rpc_errors import error_from_rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from loraplex_common import errors

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
    """Run a server of the service on a free port; give out the server and its address."""
    rights = {f"/{SERVICE}/{name}": frozenset(Role) for name in ("Once", "Stream", "Join", "Chat")}
    server = GrpcServer(config or ServerConfig(), rights=rights, **options)
    server.server.add_generic_rpc_handlers([echo.handlers()])
    server.add_service_name(SERVICE)
    port = await server.start()
    server.set_ready(True)
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.drain(settle_s=0, grace_s=0)


async def failure(call: Awaitable[Any]) -> errors.LoraplexError:
    """Wait for a call that fails and return its error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, TIMEOUT_S)
    return error_from_rpc(caught.value)


async def collect(call: AsyncIterator[str]) -> list[str]:
    """Read a stream to its end."""
    return [text async for text in call]


async def texts(*values: Any) -> AsyncIterator[Any]:
    """Stream values to a call."""
    for value in values:
        yield value


def raising(error: Exception) -> Callable[[str, Context], Awaitable[str]]:
    """Return a behaviour that raises."""

    async def behave(_text: str, _context: Context) -> str:
        raise error

    return behave
