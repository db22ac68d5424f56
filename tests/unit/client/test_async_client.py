"""The asyncio client against a gateway that plays a script."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
from loraplex_client import AsyncClient, Chunk, Finished, Started
from loraplex_common.errors import AdapterNotFoundError, NoEngineError, StreamInterruptedError
from support.gateway_double import DIGEST, GatewayDouble, chunk, finished, serving, started

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from loraplex.v1 import gateway_pb2


@pytest.fixture
def gateway() -> GatewayDouble:
    return GatewayDouble()


@pytest.fixture
async def client(gateway: GatewayDouble) -> AsyncIterator[AsyncClient]:
    with serving(gateway) as target:
        async with AsyncClient(target) as client:
            yield client


async def test_a_stream_yields_typed_events(client: AsyncClient) -> None:
    events = [event async for event in client.generate(prompt="hi", adapter="json")]

    assert [type(event) for event in events] == [Started, Chunk, Chunk, Finished]
    assert "".join(event.text for event in events) == "Hello world"
    assert [token for event in events for token in event.token_ids] == [11, 12]


async def test_many_streams_run_at_once(client: AsyncClient) -> None:
    async def text() -> str:
        return "".join([event.text async for event in client.generate(prompt="hi")])

    assert await asyncio.gather(*(text() for _ in range(50))) == ["Hello world"] * 50


async def test_a_refused_request_raises_the_error_the_gateway_raised(
    client: AsyncClient, gateway: GatewayDouble
) -> None:
    gateway.failures = [AdapterNotFoundError("no adapter 'x'")]

    with pytest.raises(AdapterNotFoundError, match="no adapter 'x'"):
        await anext(client.generate(prompt="hi", adapter="x"))


async def test_an_error_in_the_middle_comes_after_what_was_said(client: AsyncClient, gateway: GatewayDouble) -> None:
    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        yield chunk(0, "Hel", 1)
        raise StreamInterruptedError("the engine died")

    gateway.script = script
    stream = client.generate(prompt="hi")

    assert (await anext(stream)).text == "Hel"
    with pytest.raises(StreamInterruptedError, match="the engine died"):
        await anext(stream)
    assert [event async for event in stream] == []


async def test_a_stream_without_an_end_is_an_error(client: AsyncClient, gateway: GatewayDouble) -> None:
    gateway.script = lambda request: iter([started()])

    with pytest.raises(StreamInterruptedError, match="without a final event"):
        [event async for event in client.generate(prompt="hi")]


async def test_unavailable_is_retried_before_the_first_message(client: AsyncClient, gateway: GatewayDouble) -> None:
    gateway.failures = [NoEngineError("none yet")]

    assert (await client.generate_once(prompt="hi")).text == "Hello world"
    assert len(gateway.requests) == 2


@pytest.mark.parametrize("leave", ["aclose", "with", "task"])
async def test_leaving_a_stream_cancels_the_request(client: AsyncClient, gateway: GatewayDouble, leave: str) -> None:
    held = threading.Event()

    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        yield started()
        held.wait(10)
        yield finished()

    gateway.script = script
    stream = client.generate(prompt="hi")
    assert isinstance(await anext(stream), Started)

    if leave == "aclose":
        await stream.aclose()
        assert [event async for event in stream] == []
    elif leave == "with":
        async with stream:
            pass
    else:
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)  # let it begin to read
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    assert await asyncio.to_thread(gateway.cancelled.wait, 5)
    held.set()


async def test_the_rest_of_the_surface_answers(client: AsyncClient) -> None:
    assert [model.name for model in await client.list_models()] == ["base"]
    assert await client.tokenize(prompt="hi") == (104, 105)
    assert await client.detokenize([104, 105]) == "hi"
    assert await client.cancel("running")
    assert (await client.generate_once(prompt="hi")).started.adapter_revision == DIGEST
