"""Turns as chat templates expect them: `transformers`' dictionaries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_gateway.types import ChatMessage, ToolCall

Turn = dict[str, Any]


def as_turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Return a conversation as dictionaries; arguments of calls are objects, as templates read them.

    Raises:
        InvalidParameterError: If the arguments of a call are no JSON object.
    """
    return [_turn(n, message) for n, message in enumerate(messages)]


def as_tools(functions: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return functions as the list of OpenAI's ``tools``, which templates write out."""
    return [{"type": "function", "function": _described(function)} for function in functions]


def _described(function: Mapping[str, Any]) -> Turn:
    # What models are trained to see: `strict` is said to the server, and templates go through the parameters unasked.
    described = {key: value for key, value in function.items() if key != "strict"}
    return (
        described if described.get("parameters") else {**described, "parameters": {"type": "object", "properties": {}}}
    )


def _turn(n: int, message: ChatMessage) -> Turn:
    turn: Turn = {"role": message.role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.reasoning:
        turn["reasoning_content"] = turn["reasoning"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            _call(f"messages[{n}].tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _call(field: str, call: ToolCall) -> Turn:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": _arguments(f"{field}.function.arguments", call.arguments)},
    }


def _arguments(field: str, text: str) -> Turn:
    try:
        arguments = json.loads(text, parse_constant=_no_number) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidParameterError(f"{field} is no JSON: {error}", field=field) from error
    if not isinstance(arguments, dict):
        raise InvalidParameterError(f"{field} is no JSON object", field=field)
    return arguments


def _no_number(name: str) -> Turn:
    raise ValueError(f"{name} is no number of JSON")
