"""Turns conversations, OpenAI's turns and functions, into wire messages; shared by both clients."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from loraplex.v1 import gateway_pb2
from loraplex_common.errors import InvalidParameterError

ChatMessage = Mapping[str, Any]
"""One turn: ``{"role": ..., "content": ...}``, optionally with ``"name"``, ``"tool_calls"`` (OpenAI's, of an assistant's turn,
whose content may then be None), ``"tool_call_id"`` (of a turn of the role ``tool``) and ``"reasoning"``."""


def chat_messages(
    messages: Iterable[ChatMessage],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Iterable[Mapping[str, Any]] | None = None,
    **flags: bool,
) -> gateway_pb2.ChatMessages:
    """Return the conversation.

    Raises:
        InvalidParameterError: If a variable or a function is no JSON value.
        ValueError: If a message has a key that is not served, or neither content nor calls.
        TypeError: If a message is no mapping, or a value no string.
    """
    turns = [_turn(n, message) for n, message in enumerate(messages)]
    chat = gateway_pb2.ChatMessages(messages=turns, **flags)  # type: ignore[arg-type]
    for name, value in (chat_template_kwargs or {}).items():
        chat.chat_template_kwargs[name] = _json(f"chat_template_kwargs.{name}", value)
    chat.tools.extend(_json(f"tools[{n}]", tool.get("function", tool)) for n, tool in enumerate(tools or ()))
    return chat


def _turn(n: int, message: ChatMessage) -> gateway_pb2.ChatMessage:
    fields = dict(message)
    calls = [
        _tool_call(f"messages[{n}].tool_calls[{i}]", call)
        for i, call in enumerate(fields.pop("tool_calls", None) or ())
    ]
    if fields.get("content") is None:
        if not calls:
            raise ValueError(f"message {n} has no content")
        fields["content"] = ""
    if "reasoning_content" in fields:  # vLLM's other name
        fields["reasoning"] = fields.pop("reasoning_content")
    return gateway_pb2.ChatMessage(**fields, tool_calls=calls)


def _tool_call(field: str, call: Mapping[str, Any]) -> gateway_pb2.ToolCall:
    """Return a call of OpenAI's shape; its arguments may be an object as well as an object's text."""
    function = call["function"] if isinstance(call.get("function"), Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", "")
    if name is None:
        raise InvalidParameterError(f"{field} names no function", field=field)
    text = arguments if isinstance(arguments, str) else _json(f"{field}.function.arguments", arguments)
    return gateway_pb2.ToolCall(id=call.get("id") or "", name=name, arguments=text)


def _json(field: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidParameterError(f"{field} is no JSON value: {error}", field=field) from error
