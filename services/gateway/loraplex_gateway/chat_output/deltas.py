"""What a parser of chat output yields: news of thoughts, content and tool calls, in the order of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of what the assistant says."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what it thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call of a function begins; calls are counted from 0 in the order of their beginnings."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of a call's arguments, which together are the text of a JSON object."""

    index: int
    text: str


Delta: TypeAlias = ContentDelta | ReasoningDelta | ToolCallStart | ArgumentsDelta


class ChatParser(Protocol):
    """Splits one output's text into deltas; one parser for each choice."""

    def push(self, text: str) -> Sequence[Delta]:
        """Take more text, special tokens included where the format has them; return what it brings."""

    def finish(self) -> Sequence[Delta]:
        """Return what was held back, once the output has ended."""
