"""POST /v1/responses, with the official client: objects, events in their order, and what is refused by name."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from loraplex.v1 import gateway_pb2
from openai.types.responses import Response
from support.gateway_rig import DIGEST, Rig, running_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration


@asynccontextmanager
async def client_of(rig: Rig, api_key: str = "none") -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key=api_key, max_retries=0) as client:
        yield client


def prompt_of(rig: Rig, n: int = -1) -> str:
    ids = list(rig.engine.submits[n].prompt_token_ids)
    return rig.app.catalog.models[0].tokenizer.decode_now(ids, skip_special_tokens=False)


async def test_a_response_has_all_that_the_object_must_have(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        response = await client.responses.create(
            model="poet", input="hi", max_output_tokens=6, metadata={"a": "b"}, user="u", temperature=0
        )

        Response.model_validate(response.to_dict())  # strictly: the client itself takes anything
        (message,) = response.output
        assert (message.role, message.status, message.content[0].annotations) == ("assistant", "incomplete", [])
        assert len(response.output_text) > 0
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (response.metadata, response.user, response.temperature) == ({"a": "b"}, "u", 0)
        assert response.usage.output_tokens == 6
        assert response.usage.total_tokens == response.usage.input_tokens + 6
        assert response.system_fingerprint == DIGEST
        assert rig.engine.submits[0].adapter_digest == DIGEST
        rig.check_idle()


async def test_an_output_that_stops_is_completed(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        rig.engine.finish, rig.engine.stop_token_id = gateway_pb2.FINISH_REASON_STOP, 1

        response = await client.responses.create(model="tiny", input="hi", max_output_tokens=4)

        assert (response.status, response.incomplete_details, response.output[0].status) == (
            "completed",
            None,
            "completed",
        )
        assert response.completed_at >= response.created_at


ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


async def test_a_stream_has_every_event_in_its_order_and_adds_up(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        rig.engine.finish, rig.engine.stop_token_id = gateway_pb2.FINISH_REASON_STOP, 1
        whole = await client.responses.create(model="tiny", input="hi", max_output_tokens=6)
        stream = await client.responses.create(model="tiny", input="hi", max_output_tokens=6, stream=True)
        events = [event async for event in stream]

        kinds = [event.type for event in events]
        assert list(dict.fromkeys(kinds)) == [*ORDER, "response.completed"]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == whole.output_text == events[-1].response.output_text
        assert events[2].item.content == []
        assert events[3].part.text == ""
        assert {event.item_id for event in events if hasattr(event, "item_id")} == {events[2].item.id}
        assert events[-1].response.usage == whole.usage
        assert events[0].response.status == events[1].response.status == "in_progress"
        for event in events:
            type(event).model_validate(event.to_dict())


async def test_a_cut_stream_ends_in_response_incomplete(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        stream = await client.responses.create(model="tiny", input="hi", max_output_tokens=3, stream=True)
        last = [event async for event in stream][-1]

        assert last.type == "response.incomplete"
        assert last.response.incomplete_details.reason == "max_output_tokens"
        assert last.response.output[0].status == "incomplete"


async def test_the_clients_own_stream_helper_puts_the_response_together(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        rig.engine.finish, rig.engine.stop_token_id = gateway_pb2.FINISH_REASON_STOP, 1
        async with client.responses.stream(model="tiny", input="hi", max_output_tokens=5) as stream:
            snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
            response = await stream.get_final_response()

        assert snapshots[-1] == response.output_text


async def test_logprobs_come_with_the_text_if_included(valkey_url: str) -> None:
    call = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 3}
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        whole = await client.responses.create(model="tiny", input="hi", **call)
        stream = await client.responses.create(model="tiny", input="hi", stream=True, **call)
        streamed = [entry async for e in stream if e.type == "response.output_text.delta" for entry in e.logprobs]

        logprobs = whole.output[0].content[0].logprobs
        assert "".join(entry.token for entry in logprobs) == whole.output_text
        assert [len(entry.top_logprobs) for entry in logprobs] == [2, 2, 2]
        assert [entry.token for entry in streamed] == [entry.token for entry in logprobs]
        assert whole.top_logprobs == 2


async def test_items_become_the_turns_of_the_conversation(valkey_url: str) -> None:
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
        },
        {"role": "user", "content": "c"},
    ]
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        await client.responses.create(model="tiny", input=items, instructions="rhyme", max_output_tokens=1)

        assert prompt_of(rig) == (
            "<|im_start|>system\nrhyme\n\nbe brief<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
            "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        )


async def test_an_answers_items_can_be_sent_back_as_they_are(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        first = await client.responses.create(model="tiny", input="hi", max_output_tokens=4)
        history = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "go on"}]

        await client.responses.create(model="tiny", input=history, max_output_tokens=1)

        assert f"<|im_start|>assistant\n{first.output_text}<|im_end|>" in prompt_of(rig)


async def test_extra_body_as_vllm_has_it_reaches_the_engine(valkey_url: str) -> None:
    extra = {"top_k": 5, "min_p": 0.2, "seed": 7, "adapter_scale": 0.5, "min_tokens": 2, "stop_token_ids": [9]}
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        await client.responses.create(model="poet", input="hi", max_output_tokens=4, top_p=0.5, extra_body=extra)

        (submit,) = rig.engine.submits
        assert (submit.sampling.top_k, submit.sampling.seed, submit.adapter_scale) == (5, 7, 0.5)
        assert submit.stopping.min_new_tokens == 2
        assert submit.sampling.top_p == pytest.approx(0.5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"max_tool_calls": 1}, "max_tool_calls"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"include": ["reasoning.encrypted_content", "message.input_image.image_url"]}, "include[1]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
    ({"tool_choice": "never"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"truncation": "sometimes"}, "truncation"),
    ({"input": []}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": "x", "weight": 1}]}, "input[0].weight"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"max_output_tokens": -1}, "max_output_tokens"),
    ({"max_output_tokens": 10**9}, "max_output_tokens"),
    ({"temperature": 101}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"extra_body": {"max_tokens": 5}}, "max_tokens"),
    ({"extra_body": {"messages": []}}, "messages"),
    ({"extra_body": {"n": 2}}, "n"),
    ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
    ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
    ({"extra_body": {"lora_name": "poet"}}, "lora_name"),
]


async def test_what_is_not_served_is_refused_by_the_name_that_the_body_gives_it(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        for call, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(**{"model": "tiny", "input": "x", **call})
            body: Any = caught.value.body
            assert body["param"] == param, (call, body)
            assert body["message"], call
        assert not rig.engine.submits
        rig.check_idle()


async def test_null_and_what_asks_for_nothing_pass(valkey_url: str) -> None:
    null = dict.fromkeys(("instructions", "tools", "store", "previous_response_id", "text", "reasoning", "include"))
    harmless: dict[str, Any] = {
        "store": False,
        "background": False,
        "include": ["reasoning.encrypted_content"],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"summary": "auto"},
        "truncation": "disabled",
        "service_tier": "auto",
        "max_output_tokens": 1,
        "instructions": "",
        "metadata": {},
        "prompt_cache_key": "k",
    }
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient() as http:
        for extra in (null, harmless):
            answer = await http.post(f"{rig.http}/v1/responses", json={"model": "tiny", "input": "x", **extra})
            assert answer.status_code == 200, answer.text


async def test_what_would_have_to_be_kept_is_not_found_with_the_reason(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError, match="responses are not kept"):
                await call("resp_1")


async def test_an_error_after_the_stream_began_is_an_event_and_a_failed_response(valkey_url: str) -> None:
    async with running_gateway(valkey_url, failover_wait_s=0.2) as rig, httpx.AsyncClient() as http:
        rig.engine.hold_at = 2
        body = {"model": "tiny", "input": "x", "max_output_tokens": 9, "stream": True}
        lines: list[str] = []
        async with http.stream("POST", f"{rig.http}/v1/responses", json=body) as response:
            async for line in response.aiter_lines():
                if not lines:
                    await rig.engine.kill()
                if line.startswith("data: "):
                    lines.append(line.removeprefix("data: "))

        error, failed = json.loads(lines[-3]), json.loads(lines[-2])
        assert lines[-1] == "[DONE]"
        assert (error["type"], error["code"]) == ("error", "STREAM_INTERRUPTED")
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert failed["response"]["error"]["code"] == "server_error"
        assert failed["sequence_number"] == error["sequence_number"] + 1


async def test_two_callers_at_once_get_their_own(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, client_of(rig) as client:
        rig.engine.hold_at = 1
        calls = [
            asyncio.create_task(client.responses.create(model=model, input="x" * n, max_output_tokens=4))
            for n, model in ((1, "tiny"), (9, "poet"))
        ]
        await rig.engine.wait_for(lambda: len(rig.engine.submits) == 2)
        rig.engine.release()
        first, second = await asyncio.gather(*calls)

        assert first.id != second.id
        assert first.output_text != second.output_text
        assert (first.model, second.model) == ("tiny", "poet")
        rig.check_idle()
