"""The parts of one output in their order: thoughts, text, calls; a part ends where the next one begins."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from loraplex_gateway.chat_output.deltas import ContentDelta, ReasoningDelta, ToolCallStart
from loraplex_gateway.openai.plain_text import PlainText
from loraplex_gateway.types import PositionLogprobs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_gateway.chat_output.deltas import ChatParser, Delta
    from loraplex_gateway.types import Chunk, Started


class PartKind(enum.Enum):
    """What a part is."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(kw_only=True, slots=True)
class Part:
    """One part.

    Attributes:
        index: Its place in the output, from 0.
        call_id: The call's own id; empty for the others.
        name: The function that a call names; empty for the others.
        texts: What has come of its text, or of a call's arguments.
        logprobs: Those of the text's tokens, if they are asked for.
    """

    kind: PartKind
    index: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class PartBegins:
    """A new part."""

    part: Part


@dataclass(frozen=True, slots=True)
class PartGrows:
    """More text of the current part."""

    part: Part
    text: str
    logprobs: Sequence[PositionLogprobs] = ()


@dataclass(frozen=True, slots=True)
class PartEnds:
    """The part is whole, or cut with the output."""

    part: Part


Step: TypeAlias = PartBegins | PartGrows | PartEnds


class OutputParts:
    """Follows one output.

    Attributes:
        parts: So far.
    """

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._parser: ChatParser = PlainText()
        self._is_plain = True
        self._thought_end_id: int | None = None
        self._num_tokens = 0  # until the thoughts end
        self._is_past_thoughts = False
        self._current: Part | None = None
        self._pending: list[PositionLogprobs] = []  # of tokens whose text the parser still holds

    @property
    def has_calls(self) -> bool:
        """Whether a function was called."""
        return any(part.kind is PartKind.CALL for part in self.parts)

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of the thoughts, what ends them included."""
        return self._num_tokens if any(part.kind is PartKind.REASONING for part in self.parts) else 0

    def start(self, started: Started) -> None:
        """Take the parser that the model's format asks for."""
        if started.make_parser is not None:
            self._parser = started.make_parser()
            self._is_plain = False
        self._thought_end_id = started.thought_end_id

    def lengthens(self, chunk: Chunk) -> bool:
        """Take a chunk that only lengthens the current text of an output without a format; return whether it is one.

        Most chunks are; they cost a tenth of what a parser and its deltas cost.
        """
        part = self._current
        if not self._is_plain or part is None or not chunk.text or chunk.logprobs or self._pending:
            return False
        part.texts.append(chunk.text)
        return True

    def push(self, chunk: Chunk) -> Iterator[Step]:
        """Take a chunk of the output; yield what it changes."""
        self._pending.extend(chunk.logprobs)
        deltas = self._parser.push(chunk.text)
        if not self._is_past_thoughts:
            self._count(chunk.token_ids, deltas)
        yield from self._steps(deltas)

    def finish(self) -> Iterator[Step]:
        """End the output; yield what was held back, and the end of the last part. An output without any is empty text."""
        yield from self._steps(self._parser.finish())
        if not self.parts:
            yield from self._begin(PartKind.TEXT)
        if self._current is not None and self._current.kind is PartKind.TEXT:
            self._current.logprobs.extend(self._pending)  # of tokens without text of their own
        yield from self._end()

    def _count(self, token_ids: Sequence[int], deltas: Sequence[Delta]) -> None:
        end_id = self._thought_end_id
        if end_id is not None and end_id in token_ids:
            self._num_tokens += token_ids.index(end_id) + 1
            self._is_past_thoughts = True
        elif deltas and not isinstance(deltas[-1], ReasoningDelta):
            self._is_past_thoughts = True  # its tokens are at most those of what ends the thoughts, and of blanks
        else:
            self._num_tokens += len(token_ids)

    def _steps(self, deltas: Sequence[Delta]) -> Iterator[Step]:
        for delta in deltas:
            if isinstance(delta, ToolCallStart):
                yield from self._begin(PartKind.CALL, call_id=delta.id, name=delta.name)
                continue
            if isinstance(delta, ContentDelta):
                kind = PartKind.TEXT
            else:
                kind = PartKind.REASONING if isinstance(delta, ReasoningDelta) else PartKind.CALL
            if not delta.text:
                continue
            if self._current is None or self._current.kind is not kind:
                yield from self._begin(kind)
            yield self._grow(delta.text)

    def _begin(self, kind: PartKind, *, call_id: str = "", name: str = "") -> Iterator[Step]:
        yield from self._end()
        self._current = Part(kind=kind, index=len(self.parts), call_id=call_id, name=name)
        self.parts.append(self._current)
        yield PartBegins(self._current)

    def _grow(self, text: str) -> PartGrows:
        part = self._current
        assert part is not None
        part.texts.append(text)
        logprobs, self._pending = self._pending, []
        if part.kind is not PartKind.TEXT:
            return PartGrows(part, text)
        part.logprobs.extend(logprobs)
        return PartGrows(part, text, logprobs)

    def _end(self) -> Iterator[Step]:
        if self._current is not None:
            ended, self._current = self._current, None
            yield PartEnds(ended)


def consume(steps: Iterator[Step]) -> None:
    """Go through steps that no stream tells of: the parts keep what they bring."""
    deque(steps, maxlen=0)
