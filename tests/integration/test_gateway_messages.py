"""POST /v1/messages and count_tokens, with Anthropic's client: messages, events in their order, refusals by name."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import pytest
from anthropic.types import Message
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import AdapterLoadingError
from support.gateway_rig import DIGEST, Rig, running_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.integration

USER = [{"role": "user", "content": "hi"}]
CALL: dict[str, Any] = {"model": "tiny", "messages": USER, "max_tokens": 6}


@asynccontextmanager
async def client_of(rig: Rig, **credentials: Any) -> AsyncIterator[Any]:
    credentials = credentials or {"api_key": "none"}
    async with anthropic.AsyncAnthropic(base_url=rig.http, max_retries=0, timeout=60, **credentials) as client:
        yield client


def error_of(failure: anthropic.APIStatusError) -> dict[str, Any]:
    body: Any = failure.body
    return dict(body["error"])


def prompt_of(rig: Rig, n: int = -1) -> str:
    ids = list(rig.engine.submits[n].prompt_token_ids)
    return rig.app.catalog.models[0].tokenizer.decode_now(ids, skip_special_tokens=False)


async def test_a_message_has_all_that_the_object_must_have(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        sampling = {"temperature": 0, "top_k": 5, "top_p": 0.5}
        message = await client.messages.create(**{**CALL, "model": "poet"}, extra_body=sampling)

        Message.model_validate(message.to_dict())
        (block,) = message.content
        assert (block.type, message.role, message.model) == ("text", "assistant", "poet")
        assert len(block.text) > 0
        assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
        assert message.usage.output_tokens == 6
        assert message.system_fingerprint == DIGEST
        assert message._request_id
        (submit,) = rig.engine.submits
        assert (submit.adapter_digest, submit.sampling.top_k) == (DIGEST, 5)
        rig.check_idle()


async def test_a_stream_has_every_event_in_its_order_and_adds_up(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        rig.engine.finish, rig.engine.stop_token_id = gateway_pb2.FINISH_REASON_STOP, 1
        whole = await client.messages.create(**CALL)
        stream = await client.messages.create(**CALL, stream=True)
        events = [event async for event in stream]

        assert list(dict.fromkeys(event.type for event in events)) == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert "".join(e.delta.text for e in events if e.type == "content_block_delta") == whole.content[0].text
        assert events[0].message.content == []
        assert events[0].message.usage.input_tokens == whole.usage.input_tokens
        assert events[-2].delta.stop_reason == whole.stop_reason == "end_turn"
        assert events[-2].usage.output_tokens == whole.usage.output_tokens
        for event in events:
            type(event).model_validate(event.to_dict())
        async with client.messages.stream(**CALL) as helper:
            assert (await helper.get_final_message()).content[0].text == whole.content[0].text


async def test_every_stream_is_pinged(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as http:
        text = (await http.post(f"{rig.http}/v1/messages", json={**CALL, "stream": True})).text

        assert 'event: ping\ndata: {"type":"ping"}\n\n' in text
        assert text.endswith('event: message_stop\ndata: {"type":"message_stop"}\n\n')


async def test_stop_sequences_end_the_text_and_are_told(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        whole = (await client.messages.create(**CALL)).content[0].text
        stopped = await client.messages.create(**CALL, stop_sequences=[whole[2:4]])

        assert stopped.content[0].text == whole[: whole.index(whole[2:4])]
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", whole[2:4])


async def test_no_tokens_at_all_may_be_asked_for(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client, httpx.AsyncClient() as http:
        message = await client.messages.create(**{**CALL, "max_tokens": 0})
        body = {"model": "tiny", "input": "hi", "max_output_tokens": 0}
        response = (await http.post(f"{rig.http}/v1/responses", json=body)).json()

        assert (message.content[0].text, message.stop_reason, message.usage.output_tokens) == ("", "max_tokens", 0)
        assert (response["status"], response["usage"]["output_tokens"]) == ("incomplete", 0)


async def test_blocks_become_the_turns_of_the_conversation(valkey_url: str) -> None:
    system = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": "e"},
    ]
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        await client.messages.create(model="tiny", max_tokens=1, system=system, messages=messages)

        assert prompt_of(rig) == (
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb\nc<|im_end|>\n"
            "<|im_start|>assistant\nd<|im_end|>\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n"
        )


async def test_an_assistants_last_words_are_gone_on_with(valkey_url: str) -> None:
    messages = [*USER, {"role": "assistant", "content": "The answer is ("}]
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        await client.messages.create(model="tiny", max_tokens=1, messages=messages)

        assert prompt_of(rig).endswith("<|im_start|>assistant\nThe answer is (")


async def test_tokens_are_counted_as_a_message_would_use_them(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        for model in ("tiny", "poet"):
            call: dict[str, Any] = {"model": model, "messages": USER, "system": "be brief"}
            count = await client.messages.count_tokens(**call)
            message = await client.messages.create(**call, max_tokens=1)

            assert count.input_tokens == message.usage.input_tokens
        for wrong, error in (
            ({"model": "nobody"}, anthropic.NotFoundError),
            ({"model": "secret"}, anthropic.NotFoundError),
            ({"model": "tiny", "messages": []}, anthropic.BadRequestError),
        ):
            with pytest.raises(error):
                await client.messages.count_tokens(**{"messages": USER, **wrong})


TOOL = {"name": "f", "input_schema": {"type": "object"}}
IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}


def _said(role: str, *blocks: Any) -> list[Any]:
    return [{"role": role, "content": list(blocks)}]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[0].input_examples"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}}, "thinking.display"),
    ({"thinking": {"type": "loud"}}, "thinking.type"),
    ({"container": "c"}, "container"),
    ({"inference_geo": "eu"}, "inference_geo"),
    ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers"),
    ({"extra_body": {"context_management": {"edits": []}}}, "context_management"),
    ({"extra_body": {"speed": "fast"}}, "speed"),
    ({"extra_body": {"stop": ["x"]}}, "stop"),
    ({"extra_body": {"n": 2}}, "n"),
    ({"extra_body": {"logprobs": True}}, "logprobs"),
    ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
    ({"messages": _said("user", IMAGE)}, "messages[0].content[0].type"),
    ({"messages": _said("user", {"type": "document", "source": {}})}, "messages[0].content[0].type"),
    (
        {"messages": _said("user", {"type": "tool_use", "id": "t", "name": "f", "input": {}})},
        "messages[0].content[0].type",
    ),
    ({"messages": _said("user", {"type": "text", "text": "x", "bold": True})}, "messages[0].content[0].bold"),
    ({"messages": _said("user", {"type": "text"})}, "messages[0].content[0].text"),
    (
        {"messages": [*USER, *_said("assistant", {"type": "redacted_thinking", "data": "x"})]},
        "messages[1].content[0].type",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": []}, "messages"),
    ({"system": [IMAGE]}, "system[0].type"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ({"stop_sequences": ["x"] * 99}, "stop_sequences"),
    ({"extra_body": {"temperature": 101}}, "temperature"),
    ({"model": ""}, "model"),
]


async def test_what_is_not_served_is_refused_by_the_name_that_the_body_gives_it(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        for call, param in REFUSED:
            with pytest.raises(anthropic.BadRequestError) as caught:
                await client.messages.create(**{**CALL, **call})
            body: Any = caught.value.body
            assert body["type"] == "error", (call, body)
            assert body["error"]["type"] == "invalid_request_error", (call, body)
            assert body["error"]["param"] == param, (call, body)
            assert body["request_id"] == caught.value.request_id, (call, body)
        assert not rig.engine.submits
        rig.check_idle()


async def test_null_and_what_asks_for_nothing_pass(valkey_url: str) -> None:
    null = dict.fromkeys(("system", "tools", "tool_choice", "thinking", "stop_sequences", "temperature", "metadata"))
    harmless: dict[str, Any] = {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "speed": "standard",
        "stop_sequences": [],
        "system": "",
        "tools": [],
    }
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as http:
        for extra in (null, harmless, {"thinking": {"type": "disabled"}}, {"thinking": {"type": "adaptive"}}):
            answer = await http.post(f"{rig.http}/v1/messages", json={**CALL, **extra})
            assert answer.status_code == 200, answer.text
        without = {name: value for name, value in CALL.items() if name != "max_tokens"}
        answer = await http.post(f"{rig.http}/v1/messages", json=without)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "max_tokens is missing"


async def test_a_key_is_taken_from_either_header_and_errors_are_anthropics(valkey_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sesame vip\n")
    async with running_gateway(valkey_url, api_keys_file=keys) as rig:
        async with client_of(rig, api_key="sesame") as client:  # as Authorization
            await client.messages.create(**{**CALL, "model": "secret"})
            await client.messages.count_tokens(model="secret", messages=USER)
        assert rig.engine.submits[-1].fairness_key == "vip"
        async with client_of(rig, auth_token="wrong") as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                await client.messages.create(**CALL)
            assert error_of(caught.value)["type"] == "authentication_error"
        async with httpx.AsyncClient() as http:
            for headers, status in (
                ({"x-api-key": "sesame"}, 200),
                ({"x-api-key": "wrong"}, 401),
                ({"x-api-key": "sesame", "authorization": "Bearer wrong"}, 200),
                ({"x-api-key": "wrong", "authorization": "Bearer sesame"}, 401),
                ({}, 401),
            ):
                answer = await http.post(f"{rig.http}/v1/messages", json=CALL, headers=headers)
                assert answer.status_code == status, headers


async def test_other_failures_have_anthropics_types_and_tell_when_to_retry(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client, httpx.AsyncClient() as http:
        rig.engine.refuse = AdapterLoadingError("on its way", retry_after_s=1.5)
        with pytest.raises(anthropic.InternalServerError) as caught:
            await client.messages.create(**{**CALL, "model": "poet"})
        assert error_of(caught.value)["type"] == "overloaded_error"
        assert caught.value.response.headers["retry-after"] == "2"
        for method, path, status in (
            ("GET", "messages", 405),
            ("POST", "messages/batches", 404),
            ("GET", "messages/batches/b1/results", 404),
        ):
            answer = await http.request(method, f"{rig.http}/v1/{path}")
            assert (answer.status_code, answer.json()["type"]) == (status, "error")
            assert path in answer.json()["error"]["message"]
        old = await http.post(f"{rig.http}/v1/messages", json=CALL, headers={"anthropic-version": "2023-01-01"})
        assert (old.status_code, old.json()["error"]["param"]) == (400, "anthropic-version")
        broken = await http.post(f"{rig.http}/v1/messages", content=b"{")
        assert (broken.status_code, broken.json()["type"]) == (400, "error")


async def test_an_error_after_the_stream_began_is_an_event(valkey_url: str) -> None:
    async with running_gateway(valkey_url, failover_wait_s=0.2) as rig, httpx.AsyncClient() as http:
        rig.engine.hold_at = 2
        lines: list[str] = []
        async with http.stream("POST", f"{rig.http}/v1/messages", json={**CALL, "stream": True}) as response:
            async for line in response.aiter_lines():
                if not lines:
                    await rig.engine.kill()
                if line:
                    lines.append(line)

        assert lines[-2] == "event: error"
        error = json.loads(lines[-1].removeprefix("data: "))
        assert (error["type"], error["error"]["reason"]) == ("error", "STREAM_INTERRUPTED")


async def test_two_callers_at_once_get_their_own(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        rig.engine.hold_at = 1
        calls = [
            asyncio.create_task(
                client.messages.create(model=model, max_tokens=4, messages=[{"role": "user", "content": "x" * n}])
            )
            for n, model in ((1, "tiny"), (9, "poet"))
        ]
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 2)
        rig.engine.release()
        first, second = await asyncio.gather(*calls)

        assert first.id != second.id
        assert first.content[0].text != second.content[0].text
        rig.check_idle()
