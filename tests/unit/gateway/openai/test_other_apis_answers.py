"""What /v1/responses and /v1/messages make of thoughts, text and calls, in events and as a whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from anthropic.types import Message
from loraplex_common.errors import NoEngineError
from loraplex_gateway.chat_output.deltas import ArgumentsDelta, ContentDelta, ReasoningDelta, ToolCallStart
from loraplex_gateway.openai.messages_api.convert import messages_plan
from loraplex_gateway.openai.messages_api.render import MessagesAnswer
from loraplex_gateway.openai.responses_api.convert import responses_request
from loraplex_gateway.openai.responses_api.render import ResponsesAnswer
from loraplex_gateway.openai.tracing import Origin
from loraplex_gateway.types import Chunk, Event, Finished, FinishReason, Started, Timings, Usage
from openai.types.responses import Response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.chat_output.deltas import Delta

ORIGIN = Origin(trace_id="t", request_id="r")
RESPONSE = json.dumps({"model": "m", "input": "x"}).encode()
MESSAGE = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9}).encode()


class Scripted:
    """Yields the deltas of its script, those of one letter of text each."""

    def __init__(self, **script: Sequence[Delta]) -> None:
        self._script = script

    def push(self, text: str) -> Sequence[Delta]:
        return [delta for letter in text for delta in self._script[letter]]

    def finish(self) -> Sequence[Delta]:
        return self._script.get("end", ())


SCRIPT: dict[str, Sequence[Delta]] = {
    "a": [ReasoningDelta("hm")],
    "b": [ReasoningDelta("."), ContentDelta("I ")],
    "c": [ContentDelta("call"), ToolCallStart(0, "call_1", "f")],
    "d": [ArgumentsDelta(0, '{"x":')],
    "e": [ArgumentsDelta(0, "1}"), ToolCallStart(1, "call_2", "g"), ArgumentsDelta(1, "{}")],
}


def events(
    text: str = "abcde", reason: FinishReason = FinishReason.STOP, script: dict[str, Sequence[Delta]] = SCRIPT
) -> list[Event]:
    started = Started(
        prompt_tokens=5,
        cached_tokens=2,
        engine_id="e",
        adapter_revision="",
        seed=0,
        make_parser=lambda: Scripted(**script),
        thought_end_id=1,
    )
    chunks = [Chunk(sequence=n, index=n, token_ids=(n,), text=letter) for n, letter in enumerate(text)]
    usage = Usage(prompt_tokens=5, output_tokens=len(text), cached_tokens=2)
    return [started, *chunks, Finished(finish_reason=reason, usage=usage, timings=Timings())]


def response() -> ResponsesAnswer:
    return ResponsesAnswer(responses_request(RESPONSE, lambda _: True, origin=ORIGIN))


def message() -> MessagesAnswer:
    return MessagesAnswer(messages_plan(MESSAGE, lambda _: True, origin=ORIGIN), trace_id="t")


def told(answer: Any, happened: list[Event]) -> list[dict[str, Any]]:
    """Return the data of every event, whose name is its type."""
    stream = b"".join(answer.frame(0, event) for event in happened) + answer.end()
    found = []
    for frame in stream.decode().removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        name, data = frame.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert name == f"event: {body['type']}"
        found.append(body)
    return found


def test_a_response_tells_of_thoughts_text_and_calls_in_their_order() -> None:
    seen = told(response(), events())

    assert [body["type"].removeprefix("response.") for body in seen] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert [body["sequence_number"] for body in seen] == list(range(len(seen)))
    items = [body["item"] for body in seen if body["type"] == "response.output_item.done"]
    assert seen[-1]["response"]["output"] == items
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call"]
    added = [body["item"]["id"] for body in seen if body["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in items]
    assert len(set(added)) == 4
    whole = json.loads(response().whole([events()]))
    assert whole["output"] == items
    Response.model_validate(whole)


def test_a_whole_response_has_what_the_model_thought_said_and_called() -> None:
    whole: Any = Response.model_validate_json(response().whole([events()]))

    reasoning, text, first, second = whole.output
    assert (reasoning.type, text.type, first.type, second.type) == (
        "reasoning",
        "message",
        "function_call",
        "function_call",
    )
    assert reasoning.content is not None
    assert reasoning.content[0].text == "hm."
    assert whole.output_text == "I call"
    assert (first.call_id, first.name, first.arguments) == ("call_1", "f", '{"x":1}')
    assert (second.call_id, second.arguments, second.status) == ("call_2", "{}", "completed")
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == 2
    assert whole.usage.input_tokens_details.cached_tokens == 2


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.TIME_LIMIT, FinishReason.CANCELLED])
def test_only_the_last_item_of_a_cut_response_is_incomplete(reason: FinishReason) -> None:
    last = told(response(), events("abcd", reason))[-1]

    assert last["type"] == "response.incomplete"
    assert last["response"]["status"] == ("cancelled" if reason is FinishReason.CANCELLED else "incomplete")
    assert [item["status"] for item in last["response"]["output"]] == ["completed", "completed", "incomplete"]


def test_a_response_without_any_text_is_an_empty_message() -> None:
    seen = told(response(), events(""))

    assert [item["content"][0]["text"] for item in seen[-1]["response"]["output"]] == [""]
    assert json.loads(response().whole([events("")]))["output"] == seen[-1]["response"]["output"]


def test_a_response_that_fails_keeps_the_items_that_were_whole() -> None:
    answer = response()
    for event in events()[:4]:
        answer.frame(0, event)

    failed = json.loads(answer.failure(NoEngineError("none is ready")).split(b"\n\n")[1].partition(b"data: ")[2])

    assert [item["type"] for item in failed["response"]["output"]] == ["reasoning", "message"]
    assert (failed["type"], failed["response"]["error"]["reason"]) == ("response.failed", "NO_ENGINE")


def test_a_message_tells_of_thoughts_text_and_calls_in_their_order() -> None:
    seen = told(message(), events())

    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    kinds = [body["type"] for body in seen]
    assert list(dict.fromkeys(kinds)) == ["message_start", "ping", *block, "message_delta", "message_stop"]
    starts = [body["content_block"]["type"] for body in seen if body["type"] == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    deltas = [(body["index"], body["delta"]["type"]) for body in seen if body["type"] == "content_block_delta"]
    assert list(dict.fromkeys(deltas)) == [
        (0, "thinking_delta"),
        (0, "signature_delta"),
        (1, "text_delta"),
        (2, "input_json_delta"),
        (3, "input_json_delta"),
    ]
    assert [body["index"] for body in seen if body["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert seen[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_a_whole_message_has_what_the_model_thought_said_and_called() -> None:
    whole: Any = Message.model_validate_json(message().whole([events()]))

    thinking, text, first, second = whole.content
    assert thinking.type == "thinking"
    assert (thinking.thinking, bool(thinking.signature)) == ("hm.", True)
    assert text.type == "text"
    assert text.text == "I call"
    assert first.type == second.type == "tool_use"
    assert (first.id, first.name, first.input, second.input) == ("call_1", "f", {"x": 1}, {})
    assert whole.stop_reason == "tool_use"
    assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (3, 2)


def test_the_arguments_of_a_cut_call_are_told_to_be_no_json() -> None:
    whole = json.loads(message().whole([events("abcd", FinishReason.LENGTH)]))

    assert whole["content"][-1]["input"] == {"INVALID_JSON": '{"x":'}
    assert whole["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("reason", "told_as"), [(FinishReason.TIME_LIMIT, "max_tokens"), (FinishReason.CANCELLED, "abort")]
)
def test_a_message_says_why_it_was_cut(reason: FinishReason, told_as: str) -> None:
    assert told(message(), events("a", reason))[-2]["delta"]["stop_reason"] == told_as


def test_what_the_parser_held_back_comes_before_the_end() -> None:
    held: dict[str, Sequence[Delta]] = {"a": (), "end": [ContentDelta("late")]}

    assert json.loads(message().whole([events("a", script=held)]))["content"] == [{"type": "text", "text": "late"}]
    deltas = [
        body["delta"] for body in told(message(), events("a", script=held)) if body["type"] == "content_block_delta"
    ]
    assert deltas == [{"type": "text_delta", "text": "late"}]
    assert json.loads(response().whole([events("a", script=held)]))["output"][0]["content"][0]["text"] == "late"
