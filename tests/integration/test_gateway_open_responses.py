"""The cases of Open Responses' compliance suite that a server of text models can be asked, written as its list has them.

Source: openresponses/openresponses, src/lib/compliance-tests.ts; the members that its schema requires of a response are
those of schema/responses.tsp. Its case with an image is refused here, by name.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from loraplex.v1 import gateway_pb2
from support.gateway_rig import Rig, running_gateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.integration

NUMBER = (int, float)
NULLABLE_TEXT = (str, type(None))
REQUIRED: dict[str, Any] = {
    "id": str,
    "object": str,
    "created_at": int,
    "completed_at": (int, type(None)),
    "status": str,
    "incomplete_details": (dict, type(None)),
    "model": str,
    "previous_response_id": NULLABLE_TEXT,
    "instructions": NULLABLE_TEXT,
    "output": list,
    "error": (dict, type(None)),
    "tools": list,
    "tool_choice": (str, dict),
    "truncation": str,
    "parallel_tool_calls": bool,
    "text": dict,
    "top_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "top_logprobs": int,
    "temperature": NUMBER,
    "reasoning": (dict, type(None)),
    "usage": (dict, type(None)),
    "max_output_tokens": (int, type(None)),
    "max_tool_calls": (int, type(None)),
    "store": bool,
    "background": bool,
    "service_tier": str,
    "metadata": dict,
    "safety_identifier": NULLABLE_TEXT,
    "prompt_cache_key": NULLABLE_TEXT,
    "user": NULLABLE_TEXT,
}
ITEM: dict[str, dict[str, Any]] = {
    "message": {"id": str, "status": str, "role": str, "content": list},
    "function_call": {"id": str, "call_id": str, "name": str, "arguments": str, "status": str},
    "reasoning": {"id": str, "content": list, "summary": list},
}
OUTPUT_TEXT = {"type": str, "text": str, "annotations": list, "logprobs": list}


def check_members(value: dict[str, Any], members: dict[str, Any]) -> None:
    for name, kind in members.items():
        assert name in value, name
        assert isinstance(value[name], kind), (name, value[name])


def check_response(response: dict[str, Any]) -> None:
    check_members(response, REQUIRED)
    assert response["object"] == "response"
    for item in response["output"]:
        check_members(item, ITEM[item["type"]])
        for part in item["content"] if item["type"] == "message" else ():
            check_members(part, OUTPUT_TEXT)


@pytest.fixture
async def rig(valkey_url: str) -> AsyncIterator[Rig]:
    async with running_gateway(valkey_url) as rig:
        rig.engine.finish, rig.engine.stop_token_id = gateway_pb2.FINISH_REASON_STOP, 1
        yield rig


async def post(rig: Rig, *messages: tuple[str, str], **more: Any) -> httpx.Response:
    items = [{"type": "message", "role": role, "content": content} for role, content in messages]
    async with httpx.AsyncClient() as http:
        body = {"model": "tiny", "input": items, "max_output_tokens": 16, **more}
        return await http.post(f"{rig.http}/v1/responses", json=body)


async def test_text_system_prompts_and_several_turns(rig: Rig) -> None:
    for messages in (
        [("user", "Say hello in exactly 3 words.")],
        [("system", "You are a pirate. Always respond in pirate speak."), ("user", "Say hello.")],
        [("user", "My name is Alice."), ("assistant", "Hello Alice! Nice to meet you."), ("user", "What is my name?")],
    ):
        response = (await post(rig, *messages, stream=False)).json()

        check_response(response)
        assert response["status"] == "completed"
        assert response["output"]


async def test_a_stream_is_events_whose_last_has_the_whole_response(rig: Rig) -> None:
    answer = await post(rig, ("user", "Count from 1 to 5."), stream=True)

    frames = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert frames[-2:] == ["data: [DONE]", ""]
    events = []
    for frame in frames[:-2]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        if "response" in event:
            check_response(event["response"])
    assert events[-1]["response"]["status"] == "completed"


async def test_labelled_turns_of_an_assistant_are_taken(rig: Rig) -> None:
    items = [
        {"type": "message", "role": "user", "content": "a"},
        {"type": "message", "role": "assistant", "phase": "commentary", "content": "b"},
        {"type": "message", "role": "user", "content": "c"},
    ]

    check_response((await post(rig, input=items)).json())


async def test_an_image_is_refused_by_name(rig: Rig) -> None:
    parts = [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": "data:image/png;base64,"},
    ]

    answer = await post(rig, input=[{"type": "message", "role": "user", "content": parts}])

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input[0].content[1].type"
