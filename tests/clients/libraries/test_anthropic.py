"""Anthropic's library: messages, their stream, their tools and their number of tokens."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from demo import KEY, MESSAGES, MODEL, PARAMETERS, ROOT, chat_text

TOOL = {"name": "get_weather", "description": "Weather of a city.", "input_schema": PARAMETERS}
GREEDY: dict[str, Any] = {"model": MODEL, "extra_body": {"temperature": 0}}


@pytest.fixture
def client() -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=ROOT, api_key=KEY, max_retries=0)


def num_prompt_tokens(usage: anthropic.types.Usage) -> int:
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_streamed_message_is_the_whole_one(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(messages=MESSAGES, max_tokens=24, **GREEDY)
    with client.messages.stream(messages=MESSAGES, max_tokens=24, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert text == whole.content[0].text == final.content[0].text == chat_text(MESSAGES, 24)
    assert final.stop_reason == whole.stop_reason
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens
    assert counted == num_prompt_tokens(whole.usage) == num_prompt_tokens(final.usage)


def test_a_tool_is_used_and_its_result_goes_back(client: anthropic.Anthropic) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 100, "tools": [TOOL], "tool_choice": {"type": "any"}}
    message = client.messages.create(**asked, **GREEDY)
    (use,) = message.content
    assert (use.type, use.name, message.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert set(use.input) == {"city"}

    with client.messages.stream(**asked, **GREEDY) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.name, streamed.input) == (use.name, use.input)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    turns = [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(
        messages=[*MESSAGES, *turns], max_tokens=8, tools=[TOOL], tool_choice={"type": "none"}, **GREEDY
    )
    assert answer.content[0].text
