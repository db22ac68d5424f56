"""From the items of a Responses body to the turns of a conversation."""

from __future__ import annotations

from typing import Any

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai import objects
from loraplex_gateway.openai.other_names import Chat
from loraplex_gateway.openai.responses_api import schema
from loraplex_gateway.openai.responses_api.schema import (
    FunctionCallItem,
    FunctionCallOutputItem,
    MessageItem,
    ReasoningItem,
)
from loraplex_gateway.text.prompt_size import check_num_messages

Turn = dict[str, Any]


def conversation(given: str | list[Any], instructions: str | None) -> Chat:
    """Return the turns that a body's input and instructions stand for.

    Raises:
        InvalidParameterError: For an item or a part that is not served, with its path.
    """
    turns = _Turns()
    if instructions:
        turns.add({"role": "system", "content": instructions}, "instructions")
    if isinstance(given, str):
        turns.add({"role": "user", "content": given}, "input")
        return turns.chat()
    if not given:
        raise InvalidParameterError("input is empty; send at least one item", field="input")
    check_num_messages(len(given))
    for n, item in enumerate(objects.read_all(given, schema.ITEMS, "input")):
        turns.take(item, f"input[{n}]")
    return turns.chat()


class _Turns:
    """Collects turns; the thoughts, words and calls of an assistant that follow each other are one turn."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._paths: list[str] = []
        self._calls: list[list[str]] = []
        self._open: Turn | None = None  # the assistant's turn that further items may still belong to

    def chat(self) -> Chat:
        """Return what has been collected."""
        for turn in self._turns:
            turn.setdefault("content", "")
        return Chat(turns=self._turns, paths=self._paths, calls=self._calls)

    def add(self, turn: Turn, path: str) -> Turn:
        """Add a turn that is whole."""
        self._open = None
        self._turns.append(turn)
        self._paths.append(path)
        self._calls.append([])
        return turn

    def take(self, item: Any, path: str) -> None:
        """Add an item to the turn that it belongs to."""
        if isinstance(item, MessageItem):
            self._message(item, path)
        elif isinstance(item, FunctionCallItem):
            call = {"name": item.name, "arguments": item.arguments}
            turn = self._assistant(path)
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": call})
            self._calls[-1].append(path)
        elif isinstance(item, FunctionCallOutputItem):
            content = _text(item.output, schema.OUTPUT_PARTS, f"{path}.output")
            self.add({"role": "tool", "content": content, "tool_call_id": item.call_id}, path)
        elif isinstance(item, ReasoningItem):
            self._reasoning(item, path)

    def _message(self, item: MessageItem, path: str) -> None:
        content = _text(item.content, schema.INPUT_PARTS, f"{path}.content")
        if item.role == "assistant":
            self._assistant(path, starts_with="content")["content"] = content
        elif item.role != "user" and len(self._turns) == 1 and self._turns[0]["role"] == "system":
            # Many templates know one system message only, and it must be the first.
            self._turns[0]["content"] += f"\n\n{content}"
        else:
            role = "system" if item.role == "developer" else item.role
            self.add({"role": role, "content": content}, path)

    def _reasoning(self, item: ReasoningItem, path: str) -> None:
        text = _text(item.content or [], schema.REASONING_PARTS, f"{path}.content")
        text = text or _text(item.summary or [], schema.SUMMARY_PARTS, f"{path}.summary")
        if text:
            self._assistant(path, starts_with="reasoning")["reasoning"] = text

    def _assistant(self, path: str, *, starts_with: str = "") -> Turn:
        """Return the assistant's open turn, or a new one if that has gone past what an item starts with."""
        turn = self._open
        if turn is None or (starts_with and ("tool_calls" in turn or "content" in turn or starts_with in turn)):
            turn = self.add({"role": "assistant"}, path)
        self._open = turn
        return turn


def _text(content: str | list[Any], kinds: objects.Kinds, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = objects.read_all(content, kinds, where)
    return "\n".join(part.text for part in parts if isinstance(part, schema.TextPart))
