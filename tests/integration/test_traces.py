"""Traces of requests through gateway, engine and store: one span each, in the caller's trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import httpx
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common import trace_names as names
from loraplex_common import tracing
from support.gateway_rig import running_gateway, text_request
from support.generation import greedy
from support.otlp_collector import Collector, running_collector
from support.stack import StackFlags, running_stack
from support.stack_fixtures import import_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

TRACE, SPAN = "a" * 32, "b" * 16
REQUEST_ID = "0b7c9b2e-7d4e-4a53-9f2a-5d7e8a1c3f10"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        tracing.configure("gateway", collector.target)
        yield collector
        tracing.shut_down()


async def test_a_stream_over_grpc_is_one_span_in_the_callers_trace(valkey_url: str, collector: Collector) -> None:
    async with running_gateway(valkey_url) as rig:
        call = rig.stub.Generate(text_request(request_id="r1", adapter="poet"), metadata=(("traceparent", PARENT),))
        num_messages = len([message async for message in call])
        (submit,) = rig.engine.submits
    tracing.flush()

    assert num_messages > 2
    (span,) = collector.spans
    assert (span.trace_id, span.parent_id) == (TRACE, SPAN)
    assert tracing.ids_of(submit.traceparent) == (TRACE, span.span_id)
    assert span.events == [names.QUEUED, names.ADMITTED, names.STARTED, names.FIRST_TOKEN]
    assert span.attributes[names.RESPONSE_ID] == "r1"
    assert span.attributes[names.ADAPTER] == "poet"
    assert span.attributes[names.OUTPUT_TOKENS] == 8
    assert span.attributes[names.FINISH_REASONS] == ["length"]
    assert span.attributes[names.ATTEMPTS] == 1


async def test_a_chat_over_http_is_one_span_in_the_callers_trace(valkey_url: str, collector: Collector) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        body = {"model": "poet", "prompt": "x", "max_tokens": 3}
        await http.post("/v1/completions", json=body, headers={"traceparent": PARENT})
    tracing.flush()

    (span,) = collector.spans
    assert (span.trace_id, span.parent_id) == (TRACE, SPAN)
    assert span.name.endswith(" poet")


async def test_a_refused_request_ends_its_span_with_the_reason(valkey_url: str, collector: Collector) -> None:
    async with running_gateway(valkey_url) as rig:
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request(adapter="nobody")))
    tracing.flush()

    (span,) = collector.spans
    assert span.is_error
    assert span.attributes[names.ERROR_TYPE] == "ADAPTER_NOT_FOUND"
    assert span.parent_id == ""


async def test_a_request_is_one_trace_from_the_gateway_to_the_store(
    tiny_world: tuple[Path, Path], tmp_path: Path
) -> None:
    model, imports = tiny_world
    with running_collector() as collector:
        flags = ("--otlp-endpoint", collector.target)
        with running_stack(tmp_path, model, imports, StackFlags(gateway=flags, engine=flags, store=flags)) as stack:
            import_all(stack)
            client = stack.client()
            await greedy(client, "tiny-a", 4, request_id=REQUEST_ID)
            await client.close()

        # all services have ended, and sent what they had
        services = ("loraplex-gateway", "loraplex-engine", "loraplex-adapter-store")
        assert all(collector.of(service) for service in services)
        (gateway,), (engine,) = (
            [span for span in collector.of(service) if span.attributes[names.REQUEST_ID] == REQUEST_ID]
            for service in services[:2]
        )
        store = next(span for span in collector.of(services[2]) if span.trace_id == gateway.trace_id)
        assert gateway.trace_id == engine.trace_id == store.trace_id
        assert (engine.parent_id, store.parent_id) == (gateway.span_id, engine.span_id)
        assert gateway.parent_id == ""
        assert engine.attributes[names.KV_PAGE_S] > 0
        assert engine.attributes[names.ADAPTER_LOAD_S] > 0
        assert (store.name, store.is_error) == (names.STORE_TRANSFER, False)
        assert engine.duration_s <= gateway.duration_s
