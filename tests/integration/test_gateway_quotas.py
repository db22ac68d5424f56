"""Quotas as callers of two gateways see them: over gRPC, over HTTP, with OpenAI's client."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from loraplex.v1 import gateway_pb2
from loraplex_gateway.quotas import accounts as quota_accounts
from support.gateway_rig import text_request
from support.quota_rig import Once, caller, client_of, limited, refusal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Valkey is there, take no busy machine for its absence."""
    if "valkey_url" in request.fixturenames:
        monkeypatch.setattr(quota_accounts, "TIMEOUT_S", 10.0)


async def test_two_gateways_serve_together_what_the_tenant_may_and_others_go_on(
    valkey_url: str, tmp_path: Path
) -> None:
    quotas = "[tenants.acme]\nrequests_per_minute = 10\n"
    async with (
        limited(valkey_url, tmp_path, quotas) as one,
        limited(valkey_url, tmp_path, quotas) as two,
        caller(one) as a,
        caller(two) as b,
        caller(two, "rival-key") as rival,
    ):
        calls = [stub.GenerateOnce(Once(request=text_request())) for _ in range(8) for stub in (a, b)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        strangers = await asyncio.gather(*(rival.GenerateOnce(Once(request=text_request())) for _ in range(20)))

        assert sum(isinstance(answer, gateway_pb2.GenerateOnceResponse) for answer in answers) == 10
        assert len(strangers) == 20


async def test_a_refusal_over_grpc_says_which_limit_how_much_and_when(valkey_url: str, tmp_path: Path) -> None:
    quotas = "[tenants.acme]\nrequests_per_minute = 2\ntokens_per_minute = 1000\n"
    async with limited(valkey_url, tmp_path, quotas) as rig, caller(rig) as stub:
        for left in (1, 0):
            call = stub.GenerateOnce(Once(request=text_request()))
            await call
            trailers = {key: value for key, value in await call.trailing_metadata() or ()}
            assert trailers["x-ratelimit-remaining-requests"] == str(left)
        num_submitted = len(rig.engine.submits)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GenerateOnce(Once(request=text_request()))

        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = rpc_status.from_call(caught.value)
        assert status is not None
        details = {detail.TypeName(): detail for detail in status.details}
        info, retry, failure = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.QuotaFailure(),
        )
        details["google.rpc.ErrorInfo"].Unpack(info)
        details["google.rpc.RetryInfo"].Unpack(retry)
        details["google.rpc.QuotaFailure"].Unpack(failure)
        assert (info.reason, info.metadata["limit"]) == ("TENANT_QUOTA", "requests_per_minute")
        assert 25_000 < retry.retry_delay.ToMilliseconds() <= 30_000
        (violation,) = failure.violations
        assert violation.subject == "tenant:acme"
        assert (violation.quota_metric, violation.quota_value) == ("requests_per_minute", 2)
        assert "2 a minute, 2 at once; 0 are left, and this call is 1" in violation.description
        trailers = {key: value for key, value in caught.value.trailing_metadata() or ()}
        assert trailers["x-ratelimit-limit-requests"] == "2"
        assert trailers["x-ratelimit-limit-tokens"] == "1000"
        assert len(rig.engine.submits) == num_submitted


async def test_a_request_refused_for_its_number_is_not_tokenised(
    valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with limited(valkey_url, tmp_path, "[default]\nrequests_per_minute = 1\n") as rig, caller(rig) as stub:
        await stub.GenerateOnce(Once(request=text_request()))
        (model,) = rig.app.catalog.models
        monkeypatch.delattr(type(model.tokenizer), "encode")

        error = await refusal(stub.GenerateOnce(Once(request=text_request())))

        assert error.exceeded[0].limit == "requests_per_minute"


async def test_openais_client_gets_its_headers_its_error_and_when_to_come_again(
    valkey_url: str, tmp_path: Path
) -> None:
    quotas = "[tenants.acme]\nrequests_per_minute = 6\ntokens_per_minute = 600\n"
    async with limited(valkey_url, tmp_path, quotas) as rig, client_of(rig) as client:
        body: dict[str, Any] = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "temperature": 0}
        first = await client.completions.with_raw_response.create(**body)
        usage = first.parse().usage
        assert usage is not None
        reserved = usage.prompt_tokens + 8
        assert {name: value for name, value in first.headers.items() if name.startswith("x-ratelimit")} == {
            "x-ratelimit-limit-requests": "6",
            "x-ratelimit-remaining-requests": "5",
            "x-ratelimit-reset-requests": "10s",
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": str(600 - reserved),
            "x-ratelimit-reset-tokens": f"{reserved / 10:g}s",
        }
        async with client.completions.with_streaming_response.create(**body, stream=True) as stream:
            assert stream.headers["x-ratelimit-remaining-requests"] == "4"
            await stream.read()

        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(**{**body, "n": 5})

        error = caught.value
        assert (error.status_code, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert "tenant 'acme' is over its quota, requests_per_minute: 6 a minute" in error.message
        assert 5 <= int(error.response.headers["retry-after"]) <= 10
        assert error.response.headers["x-ratelimit-remaining-requests"] == "4"
        # All or nothing: the five choices that were refused together have taken nothing.
        four = await client.completions.create(**{**body, "n": 4})
        assert len(four.choices) == 4


async def test_openais_client_comes_again_by_itself_when_it_is_told_to(valkey_url: str, tmp_path: Path) -> None:
    quotas = "[tenants.acme]\nrequests_per_minute = 60\nrequests_burst = 1\n"
    async with limited(valkey_url, tmp_path, quotas) as rig, client_of(rig) as client:
        patient, began = client.with_options(max_retries=2), time.monotonic()
        for _ in range(2):
            await patient.completions.create(model="tiny", prompt="the quick", max_tokens=2)

        assert 0.8 <= time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("quota", "body", "limit"),
    [
        ("requests_per_minute = 0", {}, "requests_per_minute"),
        ("tokens_per_minute = 0", {}, "tokens_per_minute"),
        ("max_concurrent_requests = 0", {}, "max_concurrent_requests"),
        ("max_concurrent_requests = 2", {"n": 3}, "max_concurrent_requests"),
    ],
)
async def test_what_can_never_be_served_is_refused_without_a_time_to_retry(
    valkey_url: str, tmp_path: Path, quota: str, body: dict[str, Any], limit: str
) -> None:
    async with limited(valkey_url, tmp_path, f"[default]\n{quota}\n") as rig, client_of(rig) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="tiny", prompt="the quick", max_tokens=2, **body)

        assert f"{limit}: " in caught.value.message
        assert "a retry does not help" in caught.value.message
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert "retry-after" not in caught.value.response.headers


async def test_a_prompt_above_a_minutes_tokens_is_served_once_and_paid_for_afterwards(
    valkey_url: str, tmp_path: Path
) -> None:
    async with limited(valkey_url, tmp_path, "[default]\ntokens_per_minute = 60\n") as rig, caller(rig) as stub:
        await stub.GenerateOnce(Once(request=text_request("x" * 200)))

        error = await refusal(stub.GenerateOnce(Once(request=text_request())))

        assert error.exceeded[0].limit == "tokens_per_minute"
        assert error.retry_after_s is not None
        assert 140 < error.retry_after_s < 240


async def test_an_answer_shorter_than_expected_gives_back_what_it_did_not_use(valkey_url: str, tmp_path: Path) -> None:
    quotas = "[default]\ntokens_per_minute = 1000\n"
    async with limited(valkey_url, tmp_path, quotas, reply=lambda submit: [20, 21]) as rig, caller(rig) as stub:
        for _ in range(8):  # as many at a time would reserve eight times 256
            stopping = gateway_pb2.StoppingParams(max_new_tokens=250)
            answer = await stub.GenerateOnce(Once(request=text_request(stopping=stopping)))
            assert answer.finished.usage.output_tokens == 2


async def test_refusals_are_counted_by_limit_and_name_the_tenant_to_those_who_may_know(
    valkey_url: str, tmp_path: Path
) -> None:
    async with limited(valkey_url, tmp_path, "[tenants.acme]\nrequests_per_minute = 0\n") as rig:
        async with client_of(rig) as client:
            for n in (1, 3):
                with pytest.raises(openai.RateLimitError):
                    await client.completions.create(model="tiny", prompt="x", max_tokens=2, n=n)
        async with httpx.AsyncClient() as http:
            shown = await http.get(rig.metrics, headers={"authorization": "Bearer root-key"})
            hidden = await http.get(rig.metrics)

        name = "loraplex_gateway_quota_refusals_total"
        assert f'{name}{{limit="requests_per_minute",tenant="acme"}} 2.0' in shown.text
        assert "acme" not in hidden.text


async def test_who_is_refused_for_requests_is_told_when_tokens_are_free_too(valkey_url: str, tmp_path: Path) -> None:
    limits = "[tenants.acme]\nrequests_per_minute = 1\ntokens_per_minute = 1\n"
    async with limited(valkey_url, tmp_path, limits) as rig, client_of(rig) as client:
        await client.completions.create(model="tiny", prompt="x", max_tokens=8)  # leaves a debt of minutes

        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="tiny", prompt="x", max_tokens=8)

    assert int(caught.value.response.headers["retry-after"]) > 120
    assert "tokens_per_minute" in caught.value.message
