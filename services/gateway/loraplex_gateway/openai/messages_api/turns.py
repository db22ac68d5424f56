"""From the turns of a Messages body to those of a chat completion."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai import objects
from loraplex_gateway.openai.body import read_object
from loraplex_gateway.openai.messages_api import fields, schema
from loraplex_gateway.openai.messages_api.schema import (
    MessageTurn,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from loraplex_gateway.openai.other_names import Chat
from loraplex_gateway.text.prompt_size import check_num_messages

Turn = dict[str, Any]
ERROR: Final = "Error: "


def conversation(messages: list[Any], system: str | list[Any] | None) -> Chat:
    """Return the turns that a body's messages and system prompt stand for.

    Raises:
        InvalidParameterError: For a block that is not served, with its path.
    """
    turns: list[Turn] = []
    paths: list[str] = []
    calls: list[list[str]] = []
    if system:
        turns.append({"role": "system", "content": _text(system, "system")})
        paths.append("system")
        calls.append([])
    check_num_messages(len(messages))
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, dict):
            raise InvalidParameterError(f"{where} must be an object", field=where)
        for turn in _turns(read_object(message, MessageTurn, fields.MESSAGE, where), f"{where}.content"):
            if turns and _is_one_turn(turns[-1], turn):
                _join(turns[-1], turn)
            else:
                turns.append(turn)
                paths.append(where)
                calls.append([])
        calls[-1:] = [calls[-1] + _places(message["content"], f"{where}.content")]
    return Chat(turns=turns, paths=paths, calls=calls)


def continues(chat: Chat) -> bool:
    """Return whether the last turn is an assistant's, which the answer goes on with.

    Raises:
        InvalidParameterError: If that turn ends in something that cannot be gone on with.
    """
    last = chat.turns[-1] if chat.turns else {}
    if last.get("role") != "assistant":
        return False
    if "tool_calls" in last or not last["content"]:
        where = f"{chat.paths[-1]}.content"
        raise InvalidParameterError(
            f"{where}: an assistant's last turn is continued, which takes text at its end; answer a tool_use with a "
            "tool_result",
            field=where,
        )
    return True


def _turns(message: MessageTurn, where: str) -> list[Turn]:
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "system":
        return [{"role": "system", "content": _text(message.content, where)}]
    if message.role == "assistant":
        return [_assistant(objects.read_all(message.content, schema.ASSISTANT_BLOCKS, where))]
    return _user(objects.read_all(message.content, schema.USER_BLOCKS, where), where)


def _assistant(blocks: list[msgspec.Struct]) -> Turn:
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
    turn: Turn = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        turn["reasoning"] = "\n".join(thoughts)
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    return {**turn, "tool_calls": calls} if calls else turn


def _places(content: str | list[Any], where: str) -> list[str]:
    """Return where the calls of a message are; only an assistant's has any."""
    if isinstance(content, str):
        return []
    return [
        f"{where}[{n}]" for n, block in enumerate(content) if isinstance(block, dict) and block["type"] == "tool_use"
    ]


def _call(block: ToolUseBlock) -> Turn:
    arguments = msgspec.json.encode(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _user(blocks: list[msgspec.Struct], where: str) -> list[Turn]:
    """Return a user's turn as those of the tools that it answers for, and its own words where they stand."""
    turns: list[Turn] = []
    for n, block in enumerate(blocks):
        if isinstance(block, ToolResultBlock):
            content = _text(block.content, f"{where}[{n}].content")
            if block.is_error and not content.casefold().startswith("error"):
                content = ERROR + content
            turns.append({"role": "tool", "content": content, "tool_call_id": block.tool_use_id})
        elif isinstance(block, TextBlock):
            turn = {"role": "user", "content": block.text}
            if turns and _is_one_turn(turns[-1], turn):
                _join(turns[-1], turn)
            else:
                turns.append(turn)
    return turns or [{"role": "user", "content": ""}]


def _is_one_turn(last: Turn, turn: Turn) -> bool:
    """Return whether two turns that follow each other are one, as Anthropic's API has it; templates want them to take turns."""
    return last["role"] == turn["role"] != "tool" and "tool_calls" not in last and "reasoning" not in turn


def _join(last: Turn, turn: Turn) -> None:
    last["content"] = "\n".join(text for text in (last["content"], turn["content"]) if text)
    if "tool_calls" in turn:
        last["tool_calls"] = turn["tool_calls"]


def _text(content: str | list[Any], where: str) -> str:
    if isinstance(content, str):
        return content
    blocks = objects.read_all(content, schema.TEXT_BLOCKS, where)
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
