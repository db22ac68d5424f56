"""Connections to gateways behind proxies: they grow old and move on, and they are quiet for long; no stream notices."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_client import AsyncClient
from loraplex_common.grpc_channel import CHANNEL_OPTIONS, open_channel
from support.gateway_rig import Rig, running_gateway, text_request
from support.proxied_gateways import (
    NUM_TOKENS,
    backends,
    long_text,
    num_served,
    one_more_gateway,
    read,
    two_gateways,
    without_retries,
)
from support.proxies import KINDS, Backend, free_port, running_proxy
from support.proxy_waits import PING
from support.tcp_relay import TcpRelay
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration

AGE_S = 0.4
PING_EVERY_MS = 50
NUM_PINGS = 5
SHORT = gateway_pb2.StoppingParams(max_new_tokens=2)
# These gateways do no TLS: a proxy that passes connections on cannot tell.
PLAIN_CHECK = {" check-ssl verify required ca-file /etc/loraplex/tls/ca.crt crt /etc/loraplex/tls/check.pem": ""}


@asynccontextmanager
async def passing_on(directory: Path, targets: list[Backend]) -> AsyncIterator[str]:
    """Run a proxy that passes connections on, and yield where it listens."""
    file, changes = "haproxy-tls.cfg", PLAIN_CHECK
    async with running_proxy("haproxy", directory, targets, file=file, changes=changes) as proxy:
        yield proxy.grpc


def reserve() -> tuple[Backend, dict[str, Any]]:
    """Return where a gateway will be that is not there yet, and its configuration."""
    grpc_port, http_port = free_port(), free_port()
    backend = Backend(grpc=f"127.0.0.1:{grpc_port}", http=f"127.0.0.1:{http_port}")
    return backend, {"port": grpc_port, "http_port": http_port}


async def hold_one(rig: Rig, channel: grpc.aio.Channel) -> asyncio.Task[list[int]]:
    """Begin a stream that goes on only when the engine is released."""
    rig.engine.hold_at = 2
    held = asyncio.create_task(read(gateway_pb2_grpc.GatewayServiceStub(channel).Generate(long_text(), timeout=60)))
    await eventually(lambda: rig.engine.submits)
    return held


async def ask_until_served_by(rig: Rig, channel: grpc.aio.Channel) -> int:
    """Ask one request after the other until a gateway has served one; return how many it took."""
    stub, num_asked = gateway_pb2_grpc.GatewayServiceStub(channel), 0
    async with httpx.AsyncClient() as http, asyncio.timeout(20):
        while not await num_served(http, rig):
            assert len(await read(stub.Generate(text_request(stopping=SHORT), timeout=30))) == 2
            num_asked += 1
    return num_asked


@pytest.mark.parametrize("kind", KINDS)
async def test_a_proxys_connections_grow_old_and_a_replica_started_later_is_used_without_losing_a_request(
    kind: str, valkey_url: str, tmp_path: Path
) -> None:
    later, ports = reserve()
    async with (
        running_gateway(valkey_url, max_connection_age_s=AGE_S) as first,
        running_proxy(kind, tmp_path, [*backends([first]), later]) as proxy,
        without_retries(proxy.grpc) as channel,
    ):
        held = await hold_one(first, channel)
        async with one_more_gateway(valkey_url, max_connection_age_s=AGE_S, **ports) as second:
            await ask_until_served_by(second, channel)
            over_at = asyncio.get_running_loop().time() + 3 * AGE_S
            while asyncio.get_running_loop().time() < over_at:
                assert await ask_until_served_by(second, channel) == 0
                stub = gateway_pb2_grpc.GatewayServiceStub(channel)
                assert len(await read(stub.Generate(text_request(stopping=SHORT), timeout=30))) == 2

            first.engine.release()
            assert len(await held) == NUM_TOKENS


async def test_a_channel_through_a_proxy_of_connections_moves_to_a_replica_started_later_and_its_stream_stays(
    valkey_url: str, tmp_path: Path
) -> None:
    later, ports = reserve()
    async with (
        running_gateway(valkey_url, max_connection_age_s=AGE_S) as first,
        passing_on(tmp_path, [*backends([first]), later]) as target,
        open_channel(target) as channel,
    ):
        held = await hold_one(first, channel)
        async with one_more_gateway(valkey_url, max_connection_age_s=AGE_S, **ports) as second:
            assert await ask_until_served_by(second, channel) > 0

            assert first.app.admission.num_running == 1, "the stream is where it began"
            first.engine.release()
            assert len(await held) == NUM_TOKENS


async def test_a_client_of_a_proxy_of_connections_leaves_a_gateway_that_drains_while_its_stream_ends_there(
    valkey_url: str, tmp_path: Path
) -> None:
    """Its connection still leads to that gateway, which refuses requests until the stream is over."""
    settings = {"drain_settle_s": 0.7, "drain_grace_s": 30.0}
    async with (
        two_gateways(valkey_url, **settings) as rigs,
        passing_on(tmp_path, backends(rigs)) as target,
        AsyncClient(target) as client,
    ):
        rigs[0].engine.hold_at = 2
        held = client.generate(prompt_token_ids=[5], max_new_tokens=NUM_TOKENS, ignore_eos=True, timeout=60)
        events = [await anext(held)]
        busy = next(rig for rig in rigs if rig.app.admission.num_running)
        draining = asyncio.create_task(busy.app.drain())
        other = next(rig for rig in rigs if rig is not busy)

        async with httpx.AsyncClient() as http, asyncio.timeout(20):
            while not await num_served(http, other):
                short = client.generate(prompt_token_ids=[5], max_new_tokens=2, ignore_eos=True, timeout=10)
                assert len([token async for event in short for token in event.token_ids]) == 2
            assert (await client.generate_once(prompt_token_ids=[5], max_new_tokens=2, ignore_eos=True)).token_ids

        assert not draining.done()
        rigs[0].engine.release()
        events += [event async for event in held]
        assert (sum(len(event.token_ids) for event in events), held.num_resumes) == (NUM_TOKENS, 0)
        await draining


async def is_calm_about_pings(rig: Rig, target: str, all_have_pinged: asyncio.Barrier) -> bool:
    """Return whether a stream that is silent while its channel pings ends well on its one connection."""
    often = dict(CHANNEL_OPTIONS) | {"grpc.keepalive_time_ms": PING_EVERY_MS}
    pings = 0

    def count(data: bytes) -> None:
        nonlocal pings
        pings += data.count(PING)

    async with (
        TcpRelay(target, watch=count) as relay,
        grpc.aio.insecure_channel(relay.target, options=[*often.items()]) as channel,
    ):
        held = await hold_one(rig, channel)
        await eventually(lambda: pings >= NUM_PINGS or held.done(), what="pings")
        await all_have_pinged.wait()
        rig.engine.release()
        return len(await held) == NUM_TOKENS and relay.num_connections == 1


async def test_pings_on_a_quiet_channel_are_taken_calmly(valkey_url: str, tmp_path: Path) -> None:
    """As often as gRPC can: two strikes, its servers' default, would have ended the connection."""
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(running_gateway(valkey_url))
        targets = [backends([rig])[0].grpc]
        for kind in KINDS:
            proxy = await stack.enter_async_context(running_proxy(kind, tmp_path, backends([rig, rig])))
            targets.append(proxy.grpc)

        all_have_pinged = asyncio.Barrier(len(targets))
        calm = await asyncio.gather(*(is_calm_about_pings(rig, target, all_have_pinged) for target in targets))

    assert all(calm), dict(zip(("none", *KINDS), calm, strict=True))
