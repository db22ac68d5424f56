"""Exactly one layer sends a request again, and that is the client: what the engine has seen is counted."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.v1 import gateway_pb2_grpc
from loraplex_client import AsyncClient
from loraplex_common.errors import EngineHungError
from support.gateway_rig import Rig, letters, running_gateway, text_request
from support.proxied_gateways import NUM_TOKENS, backends, read, two_gateways, without_retries
from support.proxies import KINDS, Backend, Proxy, free_port, running_proxy
from support.tcp_relay import TcpRelay
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.engine_double import EngineDouble

pytestmark = [pytest.mark.integration, pytest.mark.parametrize("kind", KINDS)]


@dataclass(frozen=True, slots=True)
class Cuttable:
    """Two gateways whose connections with the proxy can be cut, as a gateway's end cuts them."""

    proxy: Proxy
    rigs: list[Rig]
    relays: list[TcpRelay]

    @property
    def engine(self) -> EngineDouble:
        """The engine of both."""
        return self.rigs[0].engine

    def cut(self) -> None:
        """Cut the connections of gateways that have a request."""
        busy = [relay for rig, relay in zip(self.rigs, self.relays, strict=True) if rig.app.admission.num_running]
        assert len(busy) == 1
        busy[0].reset()


@asynccontextmanager
async def cuttable(kind: str, directory: Path, valkey_url: str) -> AsyncIterator[Cuttable]:
    """Run two gateways behind a proxy, with a relay between."""
    async with AsyncExitStack() as stack:
        rigs = await stack.enter_async_context(two_gateways(valkey_url))
        relays, relayed = [], []
        for backend in backends(rigs):
            relays.append(await stack.enter_async_context(TcpRelay(backend.grpc)))
            relayed.append(Backend(grpc=relays[-1].target, http=backend.http))
        yield Cuttable(await stack.enter_async_context(running_proxy(kind, directory, relayed)), rigs, relays)


async def test_a_gateway_that_is_lost_costs_a_caller_without_retries_its_request_and_no_proxy_repeats_it(
    kind: str, valkey_url: str, tmp_path: Path
) -> None:
    async with cuttable(kind, tmp_path, valkey_url) as behind, without_retries(behind.proxy.grpc) as channel:
        behind.engine.is_silent = True
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(text_request(), timeout=30)
        reading = asyncio.create_task(read(call))
        await eventually(lambda: behind.engine.submits)

        behind.cut()

        with pytest.raises(grpc.aio.AioRpcError):
            await reading
        behind.engine.is_silent = False
        behind.engine.notify()
        await eventually(lambda: behind.engine.aborted_ids)
        assert len(behind.engine.submits) == 1


@pytest.mark.parametrize("has_begun", [False, True], ids=["before the first message", "in the middle"])
async def test_a_gateway_that_is_lost_is_made_up_for_once_by_the_client(
    kind: str, valkey_url: str, tmp_path: Path, has_begun: bool
) -> None:
    async with cuttable(kind, tmp_path, valkey_url) as behind, AsyncClient(behind.proxy.grpc) as client:
        engine = behind.engine
        engine.is_silent, engine.hold_at = not has_begun, 2
        stream = client.generate(prompt_token_ids=[5, 6, 7], max_new_tokens=NUM_TOKENS, ignore_eos=True, timeout=60)
        events = [await anext(stream)] if has_begun else []
        reading = asyncio.create_task(anext(stream))
        await eventually(lambda: engine.submits)

        behind.cut()

        await eventually(lambda: engine.aborted_ids)  # else the engine might end it before it hears of the cut
        engine.is_silent = False
        engine.release()
        events += [await reading, *[event async for event in stream]]
        assert [token for event in events for token in event.token_ids] == list(letters(engine.submits[0]))
        assert len(engine.submits) == 2, "what was lost, and one more"
        assert len(engine.aborted_ids) == 1


async def test_an_engines_refusal_is_passed_on_and_not_tried_at_the_next_gateway(
    kind: str, valkey_url: str, tmp_path: Path
) -> None:
    """UNAVAILABLE, which proxies would like to try elsewhere."""
    async with (
        two_gateways(valkey_url) as rigs,
        running_proxy(kind, tmp_path, backends(rigs)) as proxy,
        without_retries(proxy.grpc) as channel,
    ):
        rigs[0].engine.refuse = EngineHungError("its device hangs")

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(gateway_pb2_grpc.GatewayServiceStub(channel).Generate(text_request(), timeout=30))

        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(rigs[0].engine.submits) == 1


async def is_served(channel: grpc.aio.Channel) -> bool:
    """Return whether a gateway behind the proxy says that it serves."""
    try:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_gateway_that_cannot_be_reached_is_passed_over_and_each_request_runs_once(
    kind: str, valkey_url: str, tmp_path: Path
) -> None:
    """This the proxy repeats, as no gateway has seen it; a health check may not have found out yet.

    The gateway itself must have been found: a first check that came before it was ready would be the only answer.
    """
    port = free_port()
    nobody = Backend(grpc=f"127.0.0.1:{port}", http=f"127.0.0.1:{port}")
    async with (
        running_gateway(valkey_url) as rig,
        running_proxy(kind, tmp_path, [*backends([rig]), nobody]) as proxy,
        without_retries(proxy.grpc) as channel,
    ):
        await eventually(lambda: is_served(channel))
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)

        answers = await asyncio.gather(*(read(stub.Generate(text_request(), timeout=30)) for _ in range(10)))

        assert len(answers) == len(rig.engine.submits) == 10
