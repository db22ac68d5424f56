"""Gateways behind real proxies, each with its file of deploy/proxies: what a proxy could spoil stays as it is without one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import pytest_asyncio
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_client._gateways import is_bare
from loraplex_client._resume import CUT
from loraplex_common.errors import DeadlineError, InvalidParameterError
from loraplex_common.grpc_channel import open_channel
from support.gateway_rig import text_request
from support.proxied_gateways import NUM_TOKENS, Proxied, failure_of, long_text, num_served, proxied, read
from support.proxies import KINDS
from support.tcp_relay import TcpRelay
from support.valkey import fresh_database
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

# One rig and one proxy of each kind for the whole module.
pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
# A proxy's own limits come after 15 s to 5 minutes; here after one second.
SHORT = {
    "haproxy": {"timeout client 3700s": "timeout client 10s", "timeout server 3700s": "timeout server 1s"},
    "nginx": {"grpc_read_timeout 3700s": "grpc_read_timeout 1s"},
    "envoy": {"timeout: 0s # of": "timeout: 1s # of"},
}
BODY: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 9}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def shared(
    request: pytest.FixtureRequest, valkey_server: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Proxied]:
    """Two gateways behind a proxy of each kind."""
    directory = tmp_path_factory.mktemp(request.param)
    async with proxied(request.param, directory, fresh_database(valkey_server)) as behind:
        yield behind


@pytest_asyncio.fixture(loop_scope="module")
async def behind(shared: Proxied) -> AsyncIterator[Proxied]:
    """The same, with an engine that knows of no request yet; what a test leaves behind fails it."""
    shared.engine.submits.clear()
    shared.engine.aborted_ids.clear()
    yield shared
    shared.engine.refuse = None
    shared.engine.release()
    await eventually(lambda: shared.num_running == [0, 0])
    shared.check_idle()


async def test_streams_of_one_channel_are_spread_evenly(behind: Proxied) -> None:
    behind.engine.hold_at = 2
    calls = [asyncio.create_task(read(behind.stub.Generate(long_text(), timeout=30))) for _ in range(20)]

    await eventually(lambda: len(behind.engine.submits) == 20)

    assert max(behind.num_running) <= 11, "no more than a tenth beyond its half"
    behind.engine.release()
    assert {len(tokens) for tokens in await asyncio.gather(*calls)} == {NUM_TOKENS}


async def test_requests_one_after_the_other_are_spread_evenly(behind: Proxied) -> None:
    async with httpx.AsyncClient(base_url=behind.proxy.http) as http:
        before = [await num_served(http, rig) for rig in behind.rigs]
        for _ in range(10):
            await read(behind.stub.Generate(text_request(), timeout=30))
        for _ in range(10):
            assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        served = [await num_served(http, rig) for rig in behind.rigs]

    share = [after - first for after, first in zip(served, before, strict=True)]
    assert sum(share) == 20
    assert max(share) <= 11, "no more than a tenth beyond its half"


async def test_an_errors_details_arrive_whole(behind: Proxied) -> None:
    """As large as a status gets, of characters that take three times their bytes in grpc-message."""
    long, short = "\U0001f600" * 1000, "\U0001f600" * 100
    behind.engine.refuse = InvalidParameterError(long, violations=[(short, short)] * 8, metadata={"request_id": "r1"})
    async with open_channel(f"127.0.0.1:{behind.rigs[0].app.grpc_port}") as channel:
        direct = await failure_of(gateway_pb2_grpc.GatewayServiceStub(channel).Generate(text_request(), timeout=30))

    error = await failure_of(behind.stub.Generate(text_request(), timeout=30))

    assert isinstance(error, InvalidParameterError)
    assert (error.message, error.violations) == (direct.message, direct.violations)
    assert len(error.violations) == 8
    assert len(error.message.encode()) > 600  # what is left of a status that is bounded as a whole


async def test_a_request_that_waits_long_is_not_cut(behind: Proxied) -> None:
    behind.engine.hold_at = 0
    call = asyncio.create_task(read(behind.stub.Generate(long_text(), timeout=30)))
    await asyncio.sleep(1.5)  # the claim is about time passing
    behind.engine.release()

    assert len(await call) == NUM_TOKENS


@pytest.mark.parametrize("kind", KINDS)
async def test_with_a_short_timeout_the_same_request_is_cut_and_freed(
    kind: str, valkey_server: EmbeddedValkey, tmp_path: Path
) -> None:
    """So it is these settings that let a request wait."""
    async with proxied(kind, tmp_path, fresh_database(valkey_server), changes=SHORT[kind]) as behind:
        behind.engine.hold_at = 0

        error = await failure_of(behind.stub.Generate(long_text(), timeout=30))

        assert is_bare(error)
        assert error.code in CUT, "so that a client goes on with a stream that has begun"
        await eventually(lambda: behind.engine.aborted_ids)
        await eventually(lambda: behind.num_running == [0, 0])


async def test_a_cancelled_stream_ends_on_the_engine(behind: Proxied) -> None:
    behind.engine.hold_at = 2
    call = behind.stub.Generate(long_text(request_id="r1"), timeout=30)
    await call.read()

    call.cancel()

    await eventually(lambda: behind.engine.aborted_ids == ["r1"])


async def test_a_deadline_is_the_gateways_and_ends_on_the_engine(behind: Proxied) -> None:
    behind.engine.hold_at = 2

    error = await failure_of(behind.stub.Generate(long_text(request_id="r1"), timeout=1))

    assert isinstance(error, DeadlineError)
    await eventually(lambda: behind.engine.aborted_ids == ["r1"])


def has_aborted(behind: Proxied) -> bool:
    """Return whether the engine was told of one request's end.

    HAProxy 2.6 at times leaves the end of an HTTP client's connection unread until there is something to write to it (the
    socket stays in CLOSE-WAIT with the FIN in its queue), so that there each look lets one more token through.
    """
    if behind.proxy.kind == "haproxy" and behind.engine.hold_at is not None:
        behind.engine.hold_at += 1
        behind.engine.notify()
    return len(behind.engine.aborted_ids) == 1


async def test_a_client_that_is_gone_ends_its_requests_on_the_engine(behind: Proxied) -> None:
    """Both faces: a connection of gRPC that is reset, and one of HTTP that is closed."""
    behind.engine.hold_at = 2
    async with TcpRelay(behind.proxy.grpc) as relay, open_channel(relay.target) as channel:
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(
            text_request(request_id="r1", stopping=gateway_pb2.StoppingParams(max_new_tokens=400)), timeout=30
        )
        await call.read()
        async with httpx.AsyncClient(base_url=behind.proxy.http, timeout=30) as http:
            async with http.stream(
                "POST", "/v1/completions", json=BODY | {"stream": True, "max_tokens": 400}
            ) as answer:
                await anext(answer.aiter_lines())
                assert len(behind.engine.submits) == 2
            await eventually(lambda: has_aborted(behind))

        relay.reset()

        await eventually(lambda: "r1" in behind.engine.aborted_ids)
