"""LangChain: structured output by all of its methods, and bound tools."""

from __future__ import annotations

import json

import pytest
from demo import DELFT, KEY, MESSAGES, MODEL, PROMPT, QUESTION, URL, Town, chat_text, post
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


@pytest.fixture
def chat() -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=200, max_retries=0)


def get_weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


def test_a_streamed_chat_is_the_whole_one(chat: ChatOpenAI) -> None:
    short = chat.bind(max_tokens=24)

    assert "".join(chunk.text for chunk in short.stream(PROMPT)) == short.invoke(PROMPT).text == chat_text(MESSAGES, 24)


def test_a_schema_gives_the_object_that_it_gives_without_the_library(chat: ChatOpenAI) -> None:
    assert chat.with_structured_output(Town, method="json_schema").invoke(PROMPT) == DELFT


def test_a_function_gives_an_object_of_the_class(chat: ChatOpenAI) -> None:
    assert isinstance(chat.with_structured_output(Town, method="function_calling").invoke(PROMPT), Town)


def test_json_mode_gives_the_json_object_that_it_gives_without_the_library(chat: ChatOpenAI) -> None:
    found = chat.with_structured_output(None, method="json_mode").invoke(PROMPT)

    whole = post("/chat/completions", messages=MESSAGES, max_tokens=200, response_format={"type": "json_object"})
    assert isinstance(found, dict)
    assert found == json.loads(whole["choices"][0]["message"]["content"])


def test_a_bound_tool_is_called_alike_in_a_stream_and_its_result_goes_back(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([get_weather], tool_choice="get_weather", strict=True)
    question = [HumanMessage(QUESTION)]
    answer = bound.invoke(question)
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city"}

    first, *others = bound.stream(question)
    streamed = sum(others, first)
    assert streamed.tool_calls[0]["args"] == call["args"]
    result = ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])
    assert chat.bind_tools([get_weather], tool_choice="none").invoke([*question, answer, result]).text
