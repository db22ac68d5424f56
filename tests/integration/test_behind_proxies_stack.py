"""A whole stack behind real proxies: one trace from the caller to the store, and gateways restarted under streams."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx
import pytest
from loraplex.v1 import gateway_pb2_grpc
from loraplex_common.grpc_channel import open_channel
from support.gateway_rig import text_request
from support.otlp_collector import Collector, ReceivedSpan, running_collector
from support.proxied_gateways import read
from support.proxies import KINDS, running_proxy
from support.rolling_restart import FLAGS, RestartTally, behind, restart_behind
from support.stack import Stack, running_stack
from support.stack_fixtures import import_all
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

SPAN = "b" * 16
SERVICES = ("loraplex-gateway", "loraplex-engine", "loraplex-adapter-store")
# Shorter than a proxy takes to notice: some requests are refused, and most streams cut.
HURRIED = ("--drain-settle-s", "0.2", "--drain-grace-s", "0.1")
ADAPTERS = dict(zip(KINDS, ("tiny-a", "tiny-b", "tiny-c"), strict=True))  # on no engine before


@pytest.fixture(scope="module")
def traced(
    tiny_world: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Stack, Collector]]:
    """A stack that sends its spans at once."""
    with pytest.MonkeyPatch.context() as environment, running_collector() as collector:
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        own = ("--otlp-endpoint", collector.target)
        flags = replace(FLAGS, gateway=(*HURRIED, *own), engine=(*FLAGS.engine, *own), store=own)
        with running_stack(tmp_path_factory.mktemp("traced"), *tiny_world, flags) as stack:
            import_all(stack)
            yield stack, collector


async def spans_of(collector: Collector, trace_id: str) -> list[ReceivedSpan]:
    """Return the first span of each service in a trace, once all have come."""

    def found() -> list[ReceivedSpan] | None:
        spans = [next((each for each in collector.of(name) if each.trace_id == trace_id), None) for name in SERVICES]
        whole = [each for each in spans if each is not None]
        return whole if len(whole) == len(SERVICES) else None

    spans: list[ReceivedSpan] = await eventually(found, what=f"spans of all services in {trace_id}")
    return spans


@pytest.mark.parametrize("kind", KINDS)
async def test_a_callers_trace_goes_through_a_proxy_to_gateway_engine_and_store(
    traced: tuple[Stack, Collector], kind: str, tmp_path: Path
) -> None:
    stack, collector = traced
    over_grpc, over_http = secrets.token_hex(16), secrets.token_hex(16)
    async with running_proxy(kind, tmp_path, [behind(stack.gateway)] * 2) as proxy:
        async with open_channel(proxy.grpc) as channel:
            stub = gateway_pb2_grpc.GatewayServiceStub(channel)
            metadata = (("traceparent", f"00-{over_grpc}-{SPAN}-01"),)
            await read(stub.Generate(text_request(adapter=ADAPTERS[kind]), metadata=metadata, timeout=60))
        async with httpx.AsyncClient(base_url=proxy.http, timeout=60) as http:
            body = {"model": ADAPTERS[kind], "prompt": "x", "max_tokens": 2}
            headers = {"traceparent": f"00-{over_http}-{SPAN}-01"}
            assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200

    gateway, engine, store = await spans_of(collector, over_grpc)
    assert [gateway.parent_id, engine.parent_id, store.parent_id] == [SPAN, gateway.span_id, engine.span_id]
    await eventually(
        lambda: [each.parent_id for each in collector.of(SERVICES[0]) if each.trace_id == over_http] == [SPAN]
    )


async def test_gateways_are_restarted_behind_a_proxy_and_clients_that_know_it_alone_lose_no_stream(
    traced: tuple[Stack, Collector], tmp_path: Path
) -> None:
    tally = RestartTally(proxy="envoy", seed=3, num_at_once=20, num_tokens=200)

    await restart_behind(traced[0], tmp_path, tally)

    assert not tally.wrong, "\n".join(tally.wrong[:5])
    assert tally.num_restarts == 2
    assert tally.num_resumes > 0, "streams were cut"
    assert all(tally.served), "each gateway is back in service"
