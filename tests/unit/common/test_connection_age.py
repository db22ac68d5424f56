"""Connections grow old: calls under way never notice, later ones find servers that were not there before."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from loraplex_common.grpc_channel import open_channel
from loraplex_common.grpc_server import ServerConfig
from support.echo_service import TIMEOUT_S, Context, Echo, EchoClient, running
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AGE_S = 0.3


async def tell_peer(_text: str, context: Context) -> str:
    return str(context.peer())


async def drip_until(over: asyncio.Event) -> AsyncIterator[str]:
    yield "first"
    await over.wait()
    yield "last"


async def test_a_stream_outlives_the_age_of_its_connection_and_the_next_call_dials_anew() -> None:
    echo, over = Echo(), asyncio.Event()
    echo.unary = tell_peer
    echo.stream = lambda _text, _context: drip_until(over)
    async with (
        running(echo, ServerConfig(max_connection_age_s=AGE_S)) as (_, target),
        open_channel(target) as channel,
    ):
        client = EchoClient(channel)
        stream = client.stream("x")
        assert await stream.read() == "first"
        first = await client.once("x")

        async def is_another() -> bool:
            return bool(await client.once("x") != first)

        await eventually(is_another, what="a new connection")
        await asyncio.sleep(3 * AGE_S)  # far beyond the age, and any grace that goes with it

        over.set()
        async with asyncio.timeout(TIMEOUT_S):
            assert await stream.read() == "last"


async def test_without_an_age_a_connection_stays() -> None:
    echo = Echo()
    echo.unary = tell_peer
    async with running(echo, ServerConfig()) as (_, target), open_channel(target) as channel:
        client = EchoClient(channel)
        first = await client.once("x")

        await asyncio.sleep(3 * AGE_S)

        assert await client.once("x") == first


class Balancer:
    """What a balancer of layer 4 does: gives each new connection to the last of its backends."""

    def __init__(self, *backends: str) -> None:
        self.backends = [*backends]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.backends[-1].rpartition(":")
        from_backend, to_backend = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_pump(reader, to_backend), _pump(from_backend, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def balanced(balancer: Balancer) -> AsyncIterator[str]:
    server = await asyncio.start_server(balancer.serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def echo_named(name: str) -> Echo:
    async def tell_name(_text: str, _context: Context) -> str:
        return name

    echo = Echo()
    echo.unary = tell_name
    return echo


async def test_clients_behind_a_balancer_move_on_to_a_new_server() -> None:
    config = ServerConfig(max_connection_age_s=AGE_S)
    async with running(echo_named("old"), config) as (_, old), running(echo_named("new"), config) as (_, new):
        balancer = Balancer(old)
        async with balanced(balancer) as target, open_channel(target) as channel:
            client = EchoClient(channel)
            assert await client.once("x") == "old"

            balancer.backends.append(new)

            async def is_moved() -> bool:
                return bool(await client.once("x") == "new")

            await eventually(is_moved, what="the new server in use")


def test_a_negative_age_is_refused() -> None:
    with pytest.raises(ValueError, match="max_connection_age_s"):
        ServerConfig(max_connection_age_s=-1)
