"""OpenAI's library: completions, chat, parsed outputs, tools and responses."""

from __future__ import annotations

import json

import openai
import pytest
from demo import DELFT, FUNCTION, KEY, MESSAGES, MODEL, PROMPT, URL, Town, chat_text, post

WEATHER = {"type": "function", **FUNCTION}


@pytest.fixture
def client() -> openai.OpenAI:
    return openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)


def test_a_streamed_chat_is_the_whole_one(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content == chat_text(MESSAGES, 24)
    assert chunks[-1].usage == whole.usage


def test_a_completion_repeats_and_scores_its_prompt(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    choice = client.completions.create(**asked, logprobs=2, echo=True).choices[0]

    assert choice.text == asked["prompt"] + post("/completions", **asked)["choices"][0]["text"]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])


def test_a_parsed_chat_is_an_object_of_its_class(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 200, "response_format": Town}
    message = client.chat.completions.parse(**asked).choices[0].message
    assert message.parsed == DELFT

    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == DELFT
    history = [*MESSAGES, message.model_dump(exclude_none=True), {"role": "user", "content": "And?"}]
    sent = [*MESSAGES, {"role": "assistant", "content": message.content}, history[-1]]
    again = client.chat.completions.create(model=MODEL, messages=history, temperature=0, max_tokens=8)
    assert again.choices[0].message.content == chat_text(sent, 8)


def test_a_parsed_tool_call_is_streamed_alike_and_goes_back_as_it_came(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Town, name="note_town")
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "tools": [tool]}
    message = client.chat.completions.parse(**asked, tool_choice="required", max_tokens=300).choices[0].message
    call = message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Town)

    with client.chat.completions.stream(**asked, tool_choice="required", max_tokens=300) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "noted"}
    history = [*MESSAGES, message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(
        model=MODEL, messages=history, tools=[tool], tool_choice="none", temperature=0, max_tokens=8
    )
    assert answer.choices[0].message.content


def test_a_streamed_response_is_the_whole_one_and_a_parsed_one_is_an_object(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "input": PROMPT, "temperature": 0, "max_output_tokens": 200, "text_format": Town}
    parsed = client.responses.parse(**asked)
    assert parsed.output_parsed == DELFT

    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert final.output_parsed == DELFT
    assert final.output_text == parsed.output_text
    plain = client.responses.create(model=MODEL, input=PROMPT, temperature=0, max_output_tokens=24)
    assert plain.output_text == chat_text(MESSAGES, 24)


def test_a_response_calls_a_function_and_reads_its_output(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "max_output_tokens": 100}
    called = client.responses.create(input=PROMPT, tool_choice="required", **asked)
    (call,) = called.output
    assert call.type == "function_call"
    assert call.name == "get_weather"
    assert set(json.loads(call.arguments)) == {"city"}

    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history = [*MESSAGES, call.model_dump(exclude_none=True), output]
    assert client.responses.create(input=history, tool_choice="none", **asked).output_text
