"""LiteLLM: chat, tools, schemas and responses, as a server of OpenAI's API and as vLLM."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from demo import DELFT, FUNCTION, KEY, MESSAGES, MODEL, PROMPT, URL, Town, chat_text

SERVER: dict[str, Any] = {"api_base": URL, "api_key": KEY, "temperature": 0, "num_retries": 0}


@pytest.fixture(params=["openai", "hosted_vllm"])
def model(request: pytest.FixtureRequest) -> str:
    return f"{request.param}/{MODEL}"


def test_a_streamed_chat_is_the_whole_one(model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 16, **SERVER}
    whole = litellm.completion(**asked).choices[0].message.content
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True))

    assert streamed == whole == chat_text(MESSAGES, 16)


def test_a_class_gives_the_object_that_it_gives_without_the_library(model: str) -> None:
    found = litellm.completion(model=model, messages=MESSAGES, max_tokens=200, response_format=Town, **SERVER)

    assert Town.model_validate_json(found.choices[0].message.content) == DELFT


def test_a_required_tool_is_called_and_its_result_goes_back(model: str) -> None:
    asked = {"model": model, "tools": [{"type": "function", "function": FUNCTION}], "max_tokens": 100, **SERVER}
    message = litellm.completion(messages=MESSAGES, tool_choice="required", **asked).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    # For vLLM, LiteLLM takes additionalProperties and strict out of the schema, so there may be other keys.
    assert "city" in json.loads(call.function.arguments)

    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [*MESSAGES, message.model_dump(), result]
    assert litellm.completion(messages=history, tool_choice="none", **asked).choices[0].message.content


def test_a_streamed_response_is_the_whole_one(model: str) -> None:
    asked = {"model": model, "input": PROMPT, "max_output_tokens": 16, "api_base": URL, "api_key": KEY}
    whole = litellm.responses(**asked, temperature=0).output[0].content[0].text
    events = list(litellm.responses(**asked, temperature=0, stream=True))

    streamed = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert streamed == whole == chat_text(MESSAGES, 16)
