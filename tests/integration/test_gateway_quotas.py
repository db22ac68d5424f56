"""Quotas as callers of two gateways see them: over gRPC, over HTTP, with OpenAI's client."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc
from loraplex_common.errors import NoEngineError, TenantQuotaError
from loraplex_common.grpc_channel import open_channel
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_gateway.quotas import accounts as quota_accounts
from loraplex_gateway.quotas.script import LEASE_S
from support.cut_streams import NUM_TOKENS, Cut, long_text, read_up_to, rest_of
from support.gateway_rig import Rig, model_directory, running_gateway, text_request
from support.processes import ServiceProcess
from support.valkey import running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Valkey is there, take no busy machine for its absence."""
    if "valkey_url" in request.fixturenames:
        monkeypatch.setattr(quota_accounts, "TIMEOUT_S", 10.0)


Once = gateway_pb2.GenerateOnceRequest
KEYS = "acme-key acme\nrival-key rival\nroot-key root admin\n"


@asynccontextmanager
async def limited(url: str, tmp_path: Path, quotas: str, **overrides: Any) -> AsyncIterator[Rig]:
    """Run a gateway with tenants acme and rival."""
    keys, file = tmp_path / "keys", tmp_path / "quotas.toml"
    keys.write_text(KEYS)
    if not file.exists():
        written(tmp_path, quotas)
    async with running_gateway(url, api_keys_file=keys, quotas_file=file, **overrides) as rig:
        yield rig
        assert rig.app.quotas.accounts is not None
        rig.app.quotas.accounts.check_idle()


def written(folder: Path, quotas: str) -> Path:
    """Return a quotas file."""
    file = folder / "quotas.toml"
    file.write_text(quotas)
    return file


@asynccontextmanager
async def caller(rig: Rig, key: str = "acme-key") -> AsyncIterator[gateway_pb2_grpc.GatewayServiceAsyncStub]:
    async with open_channel(f"127.0.0.1:{rig.app.grpc_port}", api_key=key) as channel:
        yield gateway_pb2_grpc.GatewayServiceStub(channel)


def client_of(rig: Rig, key: str = "acme-key") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key=key, max_retries=0)


async def refusal(call: Any) -> TenantQuotaError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = error_from_rpc(caught.value)
    assert isinstance(error, TenantQuotaError), error
    return error


async def outcome(stub: gateway_pb2_grpc.GatewayServiceAsyncStub) -> str:
    """Return the reason that a request is refused with, or OK."""
    try:
        await stub.GenerateOnce(Once(request=text_request()))
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error).reason
    return "OK"


async def is_now(stub: gateway_pb2_grpc.GatewayServiceAsyncStub, expected: str) -> bool:
    return await outcome(stub) == expected


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


async def test_what_never_started_costs_no_tokens(valkey_url: str, tmp_path: Path) -> None:
    async with limited(valkey_url, tmp_path, "[default]\ntokens_per_minute = 300\n") as rig, caller(rig) as stub:
        rig.engine.refuse = NoEngineError("not now")
        for _ in range(4):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GenerateOnce(
                    Once(request=text_request(stopping=gateway_pb2.StoppingParams(max_new_tokens=200))), timeout=2
                )
            assert error_from_rpc(caught.value).reason != "TENANT_QUOTA"


async def test_what_an_engine_reads_again_for_a_resumed_stream_counts_again(valkey_url: str, tmp_path: Path) -> None:
    """Or tokens would be free that a client says it has had: whole prompts, as often as it likes."""
    async with limited(valkey_url, tmp_path, "[default]\ntokens_per_minute = 100\n") as rig, caller(rig) as stub:
        call = stub.Generate(long_text())
        got = await read_up_to(call, long_text(), 1)
        call.cancel()
        await eventually(lambda: rig.app.claims.num_running == 0)
        resumed = got.resumed(token_ids=[30] * (NUM_TOKENS - 1), last_sequence=0, num_text_bytes=NUM_TOKENS - 1)

        answers: list[str] = []
        for _ in range(100 // NUM_TOKENS):
            try:
                await rest_of(stub.Generate(resumed, timeout=20))
            except grpc.aio.AioRpcError as error:
                answers.append(error_from_rpc(error).reason)
            else:
                answers.append("OK")

        assert answers[0] == "OK"
        assert answers[-1] == "TENANT_QUOTA"


async def test_the_end_of_a_stream_that_had_ended_costs_no_tokens(valkey_url: str, tmp_path: Path) -> None:
    async with limited(valkey_url, tmp_path, "[default]\ntokens_per_minute = 100\n") as rig, caller(rig) as stub:
        got = Cut(long_text(), [])
        async for response in stub.Generate(got.request):
            got.responses.append(response)
        got.responses.pop()

        for _ in range(10):
            assert (await rest_of(stub.Generate(got.resumed(), timeout=20)))[-1].HasField("finished")


async def test_places_of_clients_that_go_away_are_free_again_on_every_gateway(valkey_url: str, tmp_path: Path) -> None:
    quotas = "[tenants.acme]\nmax_concurrent_requests = 2\n"
    async with limited(valkey_url, tmp_path, quotas) as one, limited(valkey_url, tmp_path, quotas) as two:
        for rig in (one, two):
            for engine in rig.engines:
                engine.hold_at = 2
        async with caller(one) as a, caller(two) as b:
            running = [stub.Generate(text_request()) for stub in (a, b)]
            for stream in running:
                first: Any = await stream.read()
                assert first.HasField("started")
            error = await refusal(b.GenerateOnce(Once(request=text_request())))
            assert error.retry_after_s == 1.0
            assert error.exceeded[0].description == "2 may be under way at once; 2 are, and this call is 1"

            for stream in running:
                stream.cancel()
            for rig in (one, two):
                for engine in rig.engines:
                    engine.release()

            await eventually(lambda: is_now(b, "OK"), timeout_s=5.0)


async def test_places_of_a_gateway_that_is_killed_are_free_within_seconds(valkey_url: str, tmp_path: Path) -> None:
    quotas = "[default]\nmax_concurrent_requests = 2\n"
    async with running_gateway(valkey_url, quotas_file=written(tmp_path, quotas)) as rig:
        rig.engine.hold_at = 2
        arguments = ["--model", str(model_directory()), "--redis-url", valkey_url, "--port", "0", "--http-port", "0"]
        killed = ServiceProcess(
            "loraplex_gateway", [*arguments, "--quotas-file", str(tmp_path / "quotas.toml")], log_dir=tmp_path
        )
        try:
            await asyncio.to_thread(killed.wait_ready)
            async with open_channel(killed.grpc) as channel:
                stub = gateway_pb2_grpc.GatewayServiceStub(channel)
                streams = [stub.Generate(text_request()) for _ in range(2)]
                for stream in streams:
                    first: Any = await stream.read()
                    assert first.HasField("started")
                assert await outcome(rig.stub) == "TENANT_QUOTA"
                killed.kill()
                killed_at = time.monotonic()
                rig.engine.release()

                await eventually(lambda: is_now(rig.stub, "OK"), timeout_s=15.0)

                assert time.monotonic() - killed_at < LEASE_S + 3.0
        finally:
            killed.kill()


async def test_a_changed_file_holds_for_the_next_request_and_a_broken_one_does_not(
    valkey_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "quotas.toml"

    def rewrite(text: str) -> None:
        following = tmp_path / "quotas.next"
        following.write_text(text)
        os.replace(following, file)

    async with limited(valkey_url, tmp_path, "[default]\nrequests_per_minute = 0\n") as rig, caller(rig) as stub:
        assert await outcome(stub) == "TENANT_QUOTA"
        rewrite("[tenants.rival]\nrequests_per_minute = 0\n")
        await eventually(lambda: is_now(stub, "OK"), timeout_s=5.0)
        rewrite("[default]\nrequests_per_minutes = 0\n")
        await asyncio.sleep(1.5)  # longer than the file is not looked at
        assert await outcome(stub) == "OK"


async def test_streams_go_on_and_limits_hold_while_valkey_is_away(tmp_path: Path) -> None:
    quotas = "[default]\nrequests_per_minute = 4\n"
    with running_server(tmp_path / "valkey") as server:
        async with limited(server.url, tmp_path, quotas) as rig, caller(rig) as stub:
            await stub.GenerateOnce(Once(request=text_request()))
            server.kill()

            began = time.monotonic()
            outcomes = [await outcome(stub) for _ in range(6)]

            assert outcomes == ["OK"] * 3 + ["TENANT_QUOTA"] * 3
            assert time.monotonic() - began < 10 * quota_accounts.TIMEOUT_S
            server.start()


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


async def test_without_limits_valkey_hears_nothing_of_quotas(valkey_url: str, tmp_path: Path) -> None:
    async with limited(valkey_url, tmp_path, "[tenants.rival]\nrequests_per_minute = 5\n") as rig, caller(rig) as stub:
        call = stub.GenerateOnce(Once(request=text_request()))
        await call

        assert not [key for key, _ in await call.trailing_metadata() or () if key.startswith("x-ratelimit")]
        keys: Any = await rig.valkey.keys("loraplex:quotas:*")
        assert keys == []


async def test_who_is_refused_for_requests_is_told_when_tokens_are_free_too(valkey_url: str, tmp_path: Path) -> None:
    limits = "[tenants.acme]\nrequests_per_minute = 1\ntokens_per_minute = 1\n"
    async with limited(valkey_url, tmp_path, limits) as rig, client_of(rig) as client:
        await client.completions.create(model="tiny", prompt="x", max_tokens=8)  # leaves a debt of minutes

        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="tiny", prompt="x", max_tokens=8)

    assert int(caught.value.response.headers["retry-after"]) > 120
    assert "tokens_per_minute" in caught.value.message
