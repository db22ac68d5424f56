"""Connections that say nothing keep no caller out of a gRPC server, and those with calls are never ended for others."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from loraplex_common.grpc_server import ServerConfig
from support.echo_service import TIMEOUT_S, Echo, EchoClient, running
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_CONNECTIONS = 40
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # gRPC waits for no more before it counts one in


@asynccontextmanager
async def idle_connections(target: str, num: int) -> AsyncIterator[None]:
    """Hold connections that have shaken hands and then say nothing, and redial whenever one of them is ended."""
    host, _, port = target.rpartition(":")

    async def hold() -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(HELLO)
                while await reader.read(4096):
                    pass
                writer.close()
            await asyncio.sleep(1.0)

    tasks = [asyncio.create_task(hold()) for _ in range(num)]
    await asyncio.sleep(0.2)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def is_answered(target: str) -> bool:
    async with open_channel(target) as channel:
        try:
            return bool(await EchoClient(channel).once("hi", timeout=1.0) == "hi")
        except grpc.aio.AioRpcError:
            return False


async def test_more_idle_connections_than_there_may_be_lock_nobody_out() -> None:
    config = ServerConfig(max_connections=MAX_CONNECTIONS)
    async with running(Echo(), config) as (_, target), idle_connections(target, MAX_CONNECTIONS + 10):
        for _ in range(5):
            await eventually(lambda: is_answered(target), what="a call on a new connection")


async def test_a_connection_with_a_stream_stays_and_one_with_a_health_watch_may_go() -> None:
    echo, config = Echo(), ServerConfig(max_connections=MAX_CONNECTIONS)
    over = asyncio.Event()

    async def drip(_text: str, _context: object) -> AsyncIterator[str]:
        yield "first"
        await over.wait()
        yield "last"

    echo.stream = drip
    async with running(echo, config) as (_, target), open_channel(target) as channel, open_channel(target) as watcher:
        stream = EchoClient(channel).stream("x")
        assert await stream.read() == "first"
        watch = health_pb2_grpc.HealthStub(watcher).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        async with idle_connections(target, MAX_CONNECTIONS + 10):
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(grpc.aio.AioRpcError):
                    await watch.read()

        over.set()
        async with asyncio.timeout(TIMEOUT_S):
            assert await stream.read() == "last"
