"""Calls that a server ends while their client still writes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from loraplex_common import errors
from loraplex_common.grpc_channel import open_channel
from loraplex_common.kept_status import LOST_DETAILS, KeptStatus, answer_of
from loraplex_common.rpc_errors import error_from_rpc
from support.echo_service import SERVICE, Context, Echo, EchoClient, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

NUM_CALLS, AT_ONCE = 80, 10
LONG = "x" * 300_000
"""Several of these are more than a connection takes before they are read."""


@pytest.fixture
async def target() -> AsyncIterator[str]:
    """Address of a service that refuses every call when its first message comes."""
    echo = Echo()

    async def refuse(text: str, context: Context) -> str:
        raise errors.ConflictError("the label is elsewhere", metadata={"revision": "abc"})

    echo.unary = refuse
    async with running(echo) as (_, address):
        yield address


async def many(value: str) -> AsyncIterator[str]:
    for _ in range(64):
        yield value


async def refusals(call_once: Callable[[], Any]) -> list[errors.LoraplexError]:
    async def one() -> errors.LoraplexError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_once()
        return error_from_rpc(caught.value)

    found: list[errors.LoraplexError] = []
    for _ in range(NUM_CALLS // AT_ONCE):
        found += await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return found


def assert_all_told(found: list[errors.LoraplexError]) -> None:
    assert {type(error) for error in found} == {errors.ConflictError}
    assert {error.metadata["revision"] for error in found} == {"abc"}


@pytest.mark.parametrize("api_key", [None, "key"], ids=["plain", "with a key"])
async def test_a_client_that_still_writes_is_told_why_it_is_refused(target: str, api_key: str | None) -> None:
    async with open_channel(target, api_key=api_key) as channel:
        client = EchoClient(channel)

        found = await refusals(lambda: answer_of(client.join(many(LONG))))

    assert_all_told(found)


async def test_a_refused_stream_of_both_ways_has_its_servers_status(target: str) -> None:
    async with open_channel(target) as channel:
        client = EchoClient(channel)

        async def call_once() -> None:
            call = client.chat(many("x"))
            kept = KeptStatus(call)
            try:
                async for _ in call:
                    pass
            except grpc.aio.AioRpcError as error:
                raise kept.behind(error) from None

        found = await refusals(call_once)

    assert_all_told(found)


async def test_an_early_answer_is_an_answer() -> None:
    async def answer(messages: AsyncIterator[StringValue], context: Context) -> StringValue:
        await anext(messages)
        return StringValue(value="enough")

    server = grpc.aio.server()
    method = grpc.stream_unary_rpc_method_handler(answer, StringValue.FromString, StringValue.SerializeToString)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Join": method})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        client = EchoClient(channel)

        found = [await answer_of(client.join(many(LONG))) for _ in range(20)]

    await server.stop(None)
    assert found == ["enough"] * 20


async def test_without_a_status_of_the_servers_the_failed_write_is_the_error() -> None:
    call = EchoClient(open_channel("127.0.0.1:1")).once("x")
    kept = KeptStatus(call)
    lost = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details=LOST_DETAILS
    )

    assert kept.behind(lost) is lost
    call.cancel()
