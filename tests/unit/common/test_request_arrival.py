"""Requests that come slowly, or not at all, hold little memory and delay no other request."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue
from loraplex_common.auth import Authenticator, Principal
from loraplex_common.errors import DeadlineError, InvalidParameterError, SaturatedError, UnauthenticatedError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.request_arrival import RequestArrivals
from support.echo_service import SERVICE, TIMEOUT_S, Echo, EchoClient, failure, running, texts
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

GRACE_S = 0.1


async def never() -> AsyncIterator[str]:
    await asyncio.Event().wait()
    yield ""


async def slowly(channel: grpc.aio.Channel) -> None:
    """Make a call of one request whose request never comes."""
    method: Any = channel.stream_unary(
        f"/{SERVICE}/Once", request_serializer=StringValue.SerializeToString, response_deserializer=bytes
    )
    await method(never())


async def test_who_has_no_credentials_is_refused_before_the_request_is_read() -> None:
    authenticator = Authenticator({"key": Principal(name="acme")})
    async with running(Echo(), authenticator=authenticator) as (_, target), open_channel(target) as channel:
        error = await failure(slowly(channel))

    assert isinstance(error, UnauthenticatedError)


async def test_requests_that_never_come_give_way_to_those_that_do() -> None:
    arrivals = RequestArrivals(max_at_once=3, grace_s=GRACE_S)
    async with running(Echo(), arrivals=arrivals) as (_, target), open_channel(target) as channel:
        slow = [asyncio.create_task(failure(slowly(channel))) for _ in range(3)]
        await eventually(lambda: arrivals.is_full)
        async with asyncio.timeout(TIMEOUT_S):
            assert await EchoClient(channel).once("hi") == "hi"
        done, pending = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)

        assert [type(task.result()) for task in done] == [SaturatedError]
        assert len(pending) == 2, "no more than was needed"
        for task in pending:
            task.cancel()


async def test_a_burst_of_prompt_requests_is_served_whole_through_few_places() -> None:
    arrivals = RequestArrivals(max_at_once=2, grace_s=5.0)
    async with running(Echo(), arrivals=arrivals) as (_, target), open_channel(target) as channel:
        client = EchoClient(channel)

        assert await asyncio.gather(*(client.once(str(n)) for n in range(300))) == [str(n) for n in range(300)]


async def test_a_request_that_takes_too_long_is_given_up_though_nobody_waits() -> None:
    arrivals = RequestArrivals(longest_s=GRACE_S)
    async with running(Echo(), arrivals=arrivals) as (_, target), open_channel(target) as channel:
        error = await failure(slowly(channel))

    assert isinstance(error, DeadlineError)


async def test_a_call_without_a_request_is_refused_by_that(client: EchoClient, target: str) -> None:
    async with open_channel(target) as channel:
        method: Any = channel.stream_unary(
            f"/{SERVICE}/Once", request_serializer=StringValue.SerializeToString, response_deserializer=bytes
        )
        error = await failure(method(texts()))

    assert isinstance(error, InvalidParameterError)
    assert "without a request" in error.message


async def hi() -> str:
    return "hi"


async def test_a_slow_request_keeps_its_place_for_the_time_that_is_its_own() -> None:
    arrivals = RequestArrivals(max_at_once=1, grace_s=GRACE_S)
    slow = asyncio.create_task(arrivals.receive(asyncio.Event().wait, tenant="slow"))
    began_s = time.monotonic()
    await asyncio.sleep(0)

    assert await arrivals.receive(hi, tenant="other") == "hi"

    assert time.monotonic() - began_s >= GRACE_S
    with pytest.raises(SaturatedError, match="slowly"):
        await slow


async def test_the_tenant_with_the_most_slow_requests_loses_first() -> None:
    arrivals = RequestArrivals(max_at_once=3, grace_s=GRACE_S)
    tenants = ("modest", "greedy", "greedy")
    slow = [asyncio.create_task(arrivals.receive(asyncio.Event().wait, tenant=tenant)) for tenant in tenants]
    await asyncio.sleep(0)
    await asyncio.sleep(GRACE_S)  # all three have had their time, so that tenants alone decide

    assert await arrivals.receive(hi, tenant="other") == "hi"

    await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
    assert [task.done() for task in slow] == [False, True, False]
    with pytest.raises(SaturatedError, match="slowly"):
        slow[1].result()
    for task in slow:
        task.cancel()
