"""One choice of a chat whose output is more than content: thoughts and calls, as OpenAI's objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplex_gateway.chat_output.deltas import ContentDelta, ReasoningDelta, ToolCallStart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.chat_output.deltas import ChatParser, Delta
    from loraplex_gateway.types import Chunk, Started

Json = dict[str, Any]


class ChatParts:
    """What one choice has come to.

    Args:
        started: Its start, which has a parser to make.
        shows_thoughts: Whether thoughts are part of the answer.
    """

    def __init__(self, started: Started, *, shows_thoughts: bool) -> None:
        assert started.make_parser is not None
        self._parser: ChatParser = started.make_parser()
        self._thought_end_id = started.thought_end_id
        self._shows_thoughts = shows_thoughts
        self._content: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[Json] = []
        self._arguments: list[list[str]] = []
        self._num_tokens = 0  # until the thoughts end
        self._has_thought = self._is_past_thoughts = False

    @property
    def has_calls(self) -> bool:
        """Whether a function is called."""
        return bool(self._calls)

    @property
    def num_thought_tokens(self) -> int:
        """Tokens of the thoughts, what ends them included."""
        return self._num_tokens if self._has_thought else 0

    def push(self, chunk: Chunk) -> Json:
        """Take a chunk; return the members of a streamed `delta`, maybe none."""
        deltas = self._parser.push(chunk.text)
        self._count(chunk.token_ids, deltas)
        return self._take(deltas)

    def finish(self) -> Json:
        """Return what was held back, as `push`."""
        return self._take(self._parser.finish())

    def message(self) -> Json:
        """Return the whole message."""
        content, thoughts = "".join(self._content), "".join(self._thoughts)
        body: Json = {"role": "assistant", "content": content, "refusal": None}
        if not content and (self._has_thought or self._calls):
            body["content"] = None
        if thoughts:
            body["reasoning_content"] = body["reasoning"] = thoughts
        for call, arguments in zip(self._calls, self._arguments, strict=True):
            call["function"]["arguments"] = "".join(arguments)
        if self._calls:
            body["tool_calls"] = self._calls
        return body

    def _take(self, deltas: Sequence[Delta]) -> Json:
        body: Json = {}
        calls: dict[int, Json] = {}
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self._content.append(delta.text)
                body["content"] = body.get("content", "") + delta.text
            elif isinstance(delta, ReasoningDelta):
                self._has_thought = True
                if self._shows_thoughts:
                    self._thoughts.append(delta.text)
                    body["reasoning_content"] = body["reasoning"] = body.get("reasoning", "") + delta.text
            elif isinstance(delta, ToolCallStart):
                call: Json = {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
                self._calls.append(call)
                self._arguments.append([])
                streamed = {**call, "function": {"name": delta.name, "arguments": ""}}
                calls[delta.index] = {"index": delta.index, **streamed}
            else:
                self._arguments[delta.index].append(delta.text)
                call = calls.setdefault(delta.index, {"index": delta.index, "function": {"arguments": ""}})
                call["function"]["arguments"] += delta.text
        if calls:
            body["tool_calls"] = list(calls.values())
        return body

    def _count(self, token_ids: Sequence[int], deltas: Sequence[Delta]) -> None:
        if self._is_past_thoughts:
            return
        if self._thought_end_id is not None:
            if self._thought_end_id in token_ids:
                self._is_past_thoughts = True
                token_ids = token_ids[: list(token_ids).index(self._thought_end_id) + 1]
        elif any(not isinstance(delta, ReasoningDelta) for delta in deltas):
            self._is_past_thoughts = True
        self._num_tokens += len(token_ids)
