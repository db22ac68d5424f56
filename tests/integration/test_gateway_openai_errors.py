"""What OpenAI's own client makes of our refusals: code, type, param, and whether it tries again."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import openai
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common import errors
from support.gateway_rig import Rig, running_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration

USER = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def counting_client(rig: Rig) -> AsyncIterator[tuple[Any, list[int]]]:
    """Yield OpenAI's client with its retries, and the statuses that it has seen."""
    statuses: list[int] = []

    async def note(response: Any) -> None:
        statuses.append(response.status_code)

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]})
    async with openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key="none", http_client=http) as client:
        yield client, statuses


REFUSALS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "nobody"}, 404, "model_not_found", None),
    ({"model": "stranger"}, 422, "ADAPTER_INCOMPATIBLE", None),
    ({"model": "secret"}, 404, "model_not_found", None),
    ({"model": "a b"}, 400, "invalid_value", "model"),
    ({"model": "m" * 600}, 400, "invalid_value", "model"),
    ({"messages": [{"role": "user", "content": "x" * 4000}]}, 400, "context_length_exceeded", "messages"),
    ({"max_completion_tokens": 9000}, 400, "context_length_exceeded", "max_completion_tokens"),
    ({"max_tokens": 9000}, 400, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    ({"max_completion_tokens": -1}, 400, "invalid_value", "max_completion_tokens"),
    ({"stop": ["a", "b" * 300]}, 400, "invalid_value", "stop[1]"),
    ({"stop": "b" * 300}, 400, "invalid_value", "stop"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ({"messages": [{"role": "", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    ({"extra_body": {"min_tokens": 9}, "max_tokens": 5}, 400, "invalid_value", "min_tokens"),
    ({"extra_body": {"min_tokens": 5, "allowed_token_ids": [1, 3]}}, 400, "invalid_value", "allowed_token_ids"),
    ({"extra_body": {"adapter_scale": 10**400}}, 400, "invalid_type", "adapter_scale"),
    (
        {"extra_body": {"chat_template_kwargs": {"a": [[[[[[[[[[]]]]]]]]]]}}},
        400,
        "invalid_value",
        "chat_template_kwargs.a",
    ),
    ({"extra_body": {"adapter_scale": -1}}, 400, "invalid_value", "adapter_scale"),
]


async def test_a_final_refusal_has_openais_code_and_is_asked_for_once(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, counting_client(rig) as (client, statuses):
        for call, status, code, param in REFUSALS:
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(**{"model": "tiny", "messages": USER, **call})

            error = caught.value
            assert (error.status_code, error.code, error.param) == (status, code, param), call
            assert error.type == "invalid_request_error"
            assert "stopping." not in error.message, call
            assert statuses == [status], call
            statuses.clear()
        rig.check_idle()


async def test_a_context_length_error_has_the_sums_in_the_words_that_clients_look_for(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, counting_client(rig) as (client, _):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
            await client.completions.create(model="tiny", prompt=[5] * 500, max_tokens=20)

        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "max_tokens"
        assert "requested 20 output tokens and your prompt contains 500 input tokens" in caught.value.message
        assert "at most 12 output tokens" in caught.value.message
        filled = await client.completions.create(model="tiny", prompt=[5] * 500, max_tokens=12)
        assert filled.usage.total_tokens == 512


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (errors.RequestTooLargeError("24 pages are needed, 8 exist"), 413),
        (errors.AdapterIncompatibleError("rank 512 on q_proj"), 422),
        (errors.NotSupportedError("not by this engine"), 400),
        (errors.AdapterCorruptError("wrong digest"), 500),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_engines_final_refusal_is_not_asked_for_again(
    valkey_url: str, refusal: errors.LoraplexError, status: int
) -> None:
    async with running_gateway(valkey_url) as rig, counting_client(rig) as (client, statuses):
        rig.engine.refuse = refusal

        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model="poet", prompt="x", max_tokens=1)

        assert (caught.value.status_code, caught.value.code) == (status, refusal.reason)
        assert statuses == [status]


async def test_what_may_pass_is_asked_for_again(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, counting_client(rig) as (client, statuses):
        rig.engine.refuse = errors.SaturatedError("full", retry_after_s=0.01)

        with pytest.raises(openai.RateLimitError) as caught:
            await client.completions.create(model="tiny", prompt="x", max_tokens=1)

        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert statuses == [429, 429, 429]


async def test_a_key_that_nobody_knows_is_openais_invalid_api_key(valkey_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame vip\n")
    async with running_gateway(valkey_url, api_keys_file=keys) as rig, counting_client(rig) as (client, statuses):
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()

        assert caught.value.code == "invalid_api_key"
        assert statuses == [401]


async def test_a_model_that_does_not_exist_is_answered_with_http_means(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, counting_client(rig) as (client, _):
        with pytest.raises(openai.NotFoundError, match="GET /v1/models shows"):
            await client.models.retrieve("frobnicate")
        with pytest.raises(openai.NotFoundError, match="GET /v1/models shows"):
            await client.chat.completions.create(model="frobnicate", messages=USER)
        with pytest.raises(openai.NotFoundError, match="is no adapter name") as caught:
            await client.models.retrieve("a b")

        assert caught.value.param == "model"


async def test_top_p_0_leaves_the_likeliest_token(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, counting_client(rig) as (client, _):
        for top_p in (0, 1e-60):
            await client.chat.completions.create(model="tiny", messages=USER, max_tokens=1, top_p=top_p, temperature=1)
        sampling = gateway_pb2.SamplingParams(top_p=0, temperature=1)
        await rig.stub.GenerateOnce(
            gateway_pb2.GenerateOnceRequest(request=gateway_pb2.GenerateRequest(text="x", sampling=sampling))
        )

        drawn = [(submit.sampling.temperature, submit.sampling.top_p) for submit in rig.engine.submits]
        assert drawn == [(0.0, 1.0)] * 3
