"""What a gateway tells of its engines' page pools, by a real stack."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf import duration_pb2
from loraplex.v1 import engine_pb2, engine_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from loraplex_common.pool_view import PoolView
from support.lone_engine import PROMPT
from support.stack_fixtures import import_all

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from typing import Any

    from support.engine_sessions import EngineSessionClient
    from support.stack import Stack

pytestmark = pytest.mark.integration
TIMEOUT_S = 30.0


@asynccontextmanager
async def watching(stack: Stack) -> AsyncIterator[AsyncGenerator[tuple[fleet_pb2.WatchFleetResponse, PoolView], None]]:
    """Yield a generator of news, each with what is known of the one engine after it."""

    async def news(call: Any) -> AsyncGenerator[tuple[fleet_pb2.WatchFleetResponse, PoolView], None]:
        view = PoolView()
        async for message in call:
            view.apply(message.change)
            yield message, view

    async with open_channel(stack.gateway.grpc) as channel, asyncio.timeout(TIMEOUT_S):
        call = fleet_pb2_grpc.FleetServiceStub(channel).WatchFleet(fleet_pb2.WatchFleetRequest())
        async with aclosing(news(call)) as found:
            yield found
        call.cancel()


async def test_a_running_request_and_its_adapter_own_pages_by_name(tiny_stack: Stack) -> None:
    import_all(tiny_stack)
    names: dict[str, str] = {}
    async with watching(tiny_stack) as news, tiny_stack.client() as client:
        stream = client.generate(prompt_token_ids=PROMPT, adapter="tiny-a", max_new_tokens=480, ignore_eos=True)
        drained = asyncio.create_task(_drain(stream))
        async for message, view in news:
            names.update(message.adapter_names)
            if view.requests and (view.owners == engine_pb2.PAGE_OWNER_KV).any():
                break
        (request,) = view.requests.values()
        held = view.adapters[next(iter(view.adapters))]

        assert request.phase in (engine_pb2.PoolRequest.PHASE_PREFILL, engine_pb2.PoolRequest.PHASE_DECODE)
        assert [names[digest] for digest in request.adapter_digests] == ["tiny-a"]
        assert (view.holders == request.holder).sum() > 0
        assert (view.owners == engine_pb2.PAGE_OWNER_ADAPTER).sum() >= held.adapter.num_pages > 0
        await drained
        async for message, view in news:  # noqa: B007 -- the last one is what is looked at
            if not view.requests:
                break

        assert message.load.running == 0
        assert not (view.owners == engine_pb2.PAGE_OWNER_KV).any()


async def _drain(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_an_engine_tells_its_pool_once_per_interval(
    session: EngineSessionClient, stub: engine_pb2_grpc.EngineServiceAsyncStub
) -> None:
    call = stub.WatchPool(engine_pb2.WatchPoolRequest(interval=duration_pb2.Duration(nanos=200_000_000)))
    began = asyncio.get_running_loop().time()
    messages = [await anext(aiter(call)) for _ in range(3)]
    took_s = asyncio.get_running_loop().time() - began
    call.cancel()

    assert took_s >= 0.39
    assert [message.change.snapshot for message in messages] == [True, False, False]
    assert messages[0].change.num_pages == messages[0].load.pages_total > 0


async def test_an_interval_that_would_cost_too_much_is_refused(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
    call = stub.WatchPool(engine_pb2.WatchPoolRequest(interval=duration_pb2.Duration(nanos=1000)))
    with pytest.raises(grpc.aio.AioRpcError, match="shorter than"):
        await anext(aiter(call))
