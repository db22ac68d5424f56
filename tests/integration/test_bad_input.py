"""What clients may get wrong, over the wire: a clear status with details, and no other request disturbed."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_client import AsyncClient, Started
from loraplex_common.errors import (
    AdapterNotFoundError,
    InvalidParameterError,
    LoraplexError,
    RequestRunningError,
    SaturatedError,
)
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from support.engine_sessions import EngineSessionClient
from support.generation import PROMPT, Neighbour, greedy, start
from support.stack import Stack, read_load
from support.strict_stack import MAX_IN_GATEWAY, undisturbed_client
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

Gateway: TypeAlias = "gateway_pb2_grpc.GatewayServiceAsyncStub"


@pytest.fixture
async def client(strict_stack: Stack, neighbour: Neighbour) -> AsyncIterator[AsyncClient]:
    async with undisturbed_client(strict_stack, neighbour) as client:
        yield client


@pytest.fixture
async def gateway(strict_stack: Stack) -> AsyncIterator[Gateway]:
    async with open_channel(strict_stack.gateway.grpc) as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)


@pytest.mark.parametrize("adapter", ["nobody", "tiny-a:nolabel", "tiny-a@" + "0" * 64])
async def test_an_unknown_adapter_is_not_found(client: AsyncClient, adapter: str) -> None:
    with pytest.raises(AdapterNotFoundError, match=adapter.partition(":")[0].partition("@")[0]):
        await greedy(client, adapter)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"prompt_token_ids": list(range(10)) * 40}, "prompt"),
        ({"prompt": ""}, "text"),
        ({"prompt_token_ids": [5, 100_000]}, "token_ids"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e30}, "temperature"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": float("inf")}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 99.0}, "presence_penalty"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias"),
        ({"max_new_tokens": 2**31}, "max_new_tokens"),
        ({"min_new_tokens": 50, "max_new_tokens": 10}, "min_new_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logprobs": 1000}, "logprobs"),
        ({"adapter_scale": -1.0}, "adapter_scale"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
    ],
)
async def test_absurd_values_are_refused_by_the_name_of_their_field(
    client: AsyncClient, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        await greedy(client, "tiny-a", **options)

    assert caught.value.field is not None
    assert field in caught.value.field


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-30},
        {"temperature": 100.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 1.0, "top_k": 1},
        {"temperature": 1.0, "repetition_penalty": 1e-6},
        {"logit_bias": {5: -100.0}, "allowed_token_ids": [5]},
        {"adapter_scale": 100.0},
    ],
)
async def test_extreme_but_allowed_values_give_tokens(client: AsyncClient, options: dict[str, Any]) -> None:
    assert len(await greedy(client, "tiny-a", 8, seed=1, **options)) == 8


async def test_invalid_utf8_is_an_invalid_argument(client: AsyncClient, strict_stack: Stack) -> None:
    message = gateway_pb2.GenerateRequest(text="XX").SerializeToString().replace(b"XX", b"\xff\xfe")
    async with open_channel(strict_stack.gateway.grpc) as channel:
        generate: Any = channel.unary_stream("/loraplex.v1.GatewayService/Generate")
        call = generate(message)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_request_id_that_is_running_is_refused(client: AsyncClient) -> None:
    request_id = str(uuid.uuid4())
    first = start(client, "tiny-a", 300, request_id=request_id)
    assert isinstance(await anext(first), Started)

    with pytest.raises(RequestRunningError):
        await greedy(client, "tiny-a", request_id=request_id)

    await first.aclose()


async def test_a_client_that_stops_reading_delays_nobody(
    strict_stack: Stack, client: AsyncClient, gateway: Gateway
) -> None:
    request = gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(ids=PROMPT),
        adapter="tiny-a",
        sampling=gateway_pb2.SamplingParams(temperature=0.0),
        stopping=gateway_pb2.StoppingParams(max_new_tokens=390, ignore_eos=True),
        response_options=gateway_pb2.ResponseOptions(logprobs=20),
    )
    stuck = [gateway.Generate(request) for _ in range(4)]
    await asyncio.gather(*(call.read() for call in stuck))

    # No client reads on; the engine still finishes, or the gateway gives the request up.
    await assert_idle_but_for_neighbour(strict_stack)

    for call in stuck:
        call.cancel()


async def assert_idle_but_for_neighbour(stack: Stack) -> None:
    async def is_done() -> bool:
        load = await read_load(stack.engines[0])
        return load.running + load.waiting <= 1

    await eventually(is_done, timeout_s=30)


async def test_clients_that_vanish_leave_nothing_behind(strict_stack: Stack, client: AsyncClient) -> None:
    vanishing = strict_stack.client()
    streams = [start(vanishing, adapter, 390) for adapter in ("tiny-a", "tiny-b", None) * 4]
    await asyncio.gather(*(anext(stream) for stream in streams[:3]))

    await vanishing.close()

    await assert_idle_but_for_neighbour(strict_stack)


async def test_ten_thousand_requests_queued_on_an_engine_all_end(strict_stack: Stack, client: AsyncClient) -> None:
    expected = await greedy(client, None, 1)

    async with EngineSessionClient(strict_stack.engines[0].grpc) as session:
        outcomes = await session.submit_many(range(10_000), PROMPT, 1)
        tokens = [await session.finish(outcome, timeout_s=120) for outcome in outcomes]
        waiting = max(load.waiting for load in session.loads)

    assert waiting > 5000
    assert tokens == [expected] * 10_000


async def test_more_requests_than_a_gateway_queues_are_shed_with_a_retry_time(
    strict_stack: Stack, client: AsyncClient, gateway: Gateway
) -> None:
    request = gateway_pb2.GenerateOnceRequest(
        request=gateway_pb2.GenerateRequest(
            token_ids=gateway_pb2.TokenIds(ids=PROMPT),
            sampling=gateway_pb2.SamplingParams(temperature=0.0),
            stopping=gateway_pb2.StoppingParams(max_new_tokens=64, ignore_eos=True),
        )
    )
    expected = await greedy(client, None, 64)

    async def one() -> list[int] | LoraplexError:
        try:
            return list((await gateway.GenerateOnce(request, timeout=120)).token_ids)
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error)

    results = await asyncio.gather(*(one() for _ in range(400)))

    shed = [result for result in results if isinstance(result, LoraplexError)]
    served = [result for result in results if not isinstance(result, LoraplexError)]
    assert served == [expected] * len(served)
    assert len(served) >= MAX_IN_GATEWAY
    assert shed
    assert all(isinstance(error, SaturatedError) and error.retry_after_s is not None for error in shed)
