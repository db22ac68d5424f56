"""A trace id is shared, echoed and logged; a request's own id is no other request's."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import httpx
import pytest
import structlog
from loraplex_common.errors import RequestRunningError
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import Rig, running_gateway, text_request

pytestmark = pytest.mark.integration

BODY = {"model": "poet", "prompt": "x", "max_tokens": 3}
TRACEPARENT = f"00-{'a' * 32}-{'b' * 16}-01"


async def post(rig: Rig, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=rig.http) as http:
        return await http.post("/v1/completions", json={**BODY, **changes}, headers=headers)


async def test_calls_under_one_trace_id_run_side_by_side(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 1
        calls = [asyncio.create_task(post(rig, {"x-request-id": "trace-1"})) for _ in range(3)]
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 3)
        rig.engine.release()
        answers = [*await asyncio.gather(*calls), await post(rig, {"x-request-id": "trace-1"})]

        assert [answer.status_code for answer in answers] == [200] * 4
        assert {answer.headers["x-request-id"] for answer in answers} == {"trace-1"}
        assert len({answer.json()["id"] for answer in answers}) == 4


async def test_a_trace_id_is_logged_and_a_trace_context_passed_on(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        with structlog.testing.capture_logs() as logs:
            await post(rig, {"x-request-id": "Root=1-67891233-abc", "traceparent": TRACEPARENT}, n=2)

        lines = [line for line in logs if line["event"] == "request"]
        assert [line["trace_id"] for line in lines] == ["Root=1-67891233-abc"] * 2
        assert len({line["request_id"] for line in lines}) == 2
        assert {submit.traceparent for submit in rig.engine.submits} == {TRACEPARENT}


async def test_without_a_trace_id_the_header_has_the_requests_own(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        answer = await post(rig)

        assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"


@pytest.mark.parametrize("header", ["x" * 257, "two words", "caf\u00e9", ""])
async def test_a_header_that_is_no_id_is_not_given_back(valkey_url: str, header: str) -> None:
    async with running_gateway(valkey_url) as rig:
        answer = await post(rig, {"x-request-id": header.encode("latin-1")})  # type: ignore[dict-item]

        assert answer.status_code == 200
        assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"


async def test_refusals_carry_the_trace_id_too(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        answers = [
            await post(rig, {"x-request-id": "t"}, frobnicate=1),
            await post(rig, {"x-request-id": "t"}, model="nobody"),
            await http.get("/nowhere", headers={"x-request-id": "t"}),
            await http.get("/v1/models", headers={"x-request-id": "t"}),
        ]

        assert [answer.status_code for answer in answers] == [400, 404, 404, 200]
        assert {answer.headers["x-request-id"] for answer in answers} == {"t"}


async def test_a_bodys_request_id_is_a_key_while_the_request_runs(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 1
        first = asyncio.create_task(post(rig, request_id="mine"))
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 1)
        second = await post(rig, request_id="mine")
        rig.engine.release()

        assert second.status_code == 409
        assert second.json()["error"]["code"] == "REQUEST_RUNNING"
        assert (await first).json()["id"] == "cmpl-mine"
        assert (await post(rig, request_id="mine")).status_code == 200


async def test_grpc_calls_share_a_trace_id_but_not_a_request_id(valkey_url: str) -> None:
    metadata = (("x-request-id", "trace-1"),)
    async with running_gateway(valkey_url) as rig:
        rig.engine.hold_at = 1
        calls = [rig.stub.Generate(text_request(), metadata=metadata) for _ in range(2)]
        calls.append(rig.stub.Generate(text_request(request_id="mine")))
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 3)
        again = rig.stub.Generate(text_request(request_id="mine"), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await again.read()
        rig.engine.release()
        for call in calls:
            async for _ in call:
                pass

        assert isinstance(error_from_rpc(caught.value), RequestRunningError)
        trailers = [dict(await call.trailing_metadata() or ()) for call in (*calls, again)]
        assert [trailer.get("x-request-id") for trailer in trailers] == ["trace-1", "trace-1", None, "trace-1"]
