"""Takes one output apart, piece by piece: the same deltas, joined, however its text was cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex_gateway.chat_output.deltas import (
    ArgumentsDelta,
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallStart,
)
from loraplex_gateway.chat_output.formats import Syntax, ThoughtTags, ToolFormat
from loraplex_gateway.chat_output.json_calls import JsonRegion
from loraplex_gateway.chat_output.named_calls import NamedRegion
from loraplex_gateway.chat_output.regions import Calls, RegionReader, Step, could_begin, first_of, held_from
from loraplex_gateway.chat_output.xml_calls import XmlRegion


@dataclass(frozen=True, kw_only=True, slots=True)
class ParserRules:
    """What a parser looks for.

    Attributes:
        thoughts: The tags of thoughts; None looks for none.
        starts_in_thought: Whether the prompt has opened them already.
        tools: How calls are written; None looks for none.
        schemas: The offered functions' parameters, by name.
        is_parallel: Whether more than one call is shown.
        is_forced: Whether the output can be calls only, so that what is no whole call is the beginning of one that was cut.
    """

    thoughts: ThoughtTags | None = None
    starts_in_thought: bool = False
    tools: ToolFormat | None = None
    schemas: Mapping[str, Mapping[str, Any]]
    is_parallel: bool = True
    is_forced: bool = False


class OutputParser:
    """The parser of one choice. Space around thoughts and calls is no content.

    Args:
        rules: What it looks for.
    """

    def __init__(self, rules: ParserRules) -> None:
        self._rules = rules
        self._buffer = ""
        self._space = ""  # at the content's end: dropped if a call follows
        self._calls = Calls(schemas=rules.schemas, id_length=rules.tools.id_length if rules.tools else 0)
        self._region: RegionReader | None = None
        self._has_shown = False  # content or a thought of the part that is being read
        self._drops_space = False
        self._state: Callable[[list[Delta]], bool] = self._at_start
        if rules.starts_in_thought:
            self._state = self._in_thought

    def push(self, text: str) -> Sequence[Delta]:
        """Take more text, special tokens included where the format has them; return what it brings."""
        deltas: list[Delta] = []
        self._buffer += text
        while self._buffer and self._state(deltas):
            pass
        return self._shown(deltas)

    def finish(self) -> Sequence[Delta]:
        """Return what was held back, once the output has ended."""
        deltas: list[Delta] = []
        if self._region is not None:
            step, self._region = self._region.finish(), None
            self._content(step.malformed + (step.rest or ""), deltas)
        elif self._state == self._in_thought:
            self._thought(self._buffer.rstrip(), deltas)
        else:
            self._content(self._buffer, deltas)
        if self._calls.num == 0 and self._space:
            deltas.append(ContentDelta(self._space))
        self._buffer = self._space = ""
        return self._shown(deltas)

    def _at_start(self, deltas: list[Delta]) -> bool:
        """Look at the output's first text: a thought, a call, or content."""
        tags, tools = self._rules.thoughts, self._rules.tools
        text = self._buffer.lstrip()
        if not text:
            return False
        if tags is not None and could_begin(text, tags.opening):
            if not text.startswith(tags.opening):
                return False
            self._buffer, self._state = text.removeprefix(tags.opening), self._in_thought
            return True
        return self._at_content(deltas, tools)

    def _at_content(self, deltas: list[Delta], tools: ToolFormat | None) -> bool:
        """Begin what is behind the thoughts: calls that are all of the output, or content."""
        text = self._buffer.lstrip()
        if tools is not None and not tools.opening and text[:1] in ("{", "["):
            self._region, self._buffer = self._reader(tools, ""), text
            self._state = self._in_call
            return True
        self._state = self._in_content
        return True

    def _after_thought(self, deltas: list[Delta]) -> bool:
        self._buffer = self._buffer.lstrip()
        return bool(self._buffer) and self._at_content(deltas, self._rules.tools)

    def _in_thought(self, deltas: list[Delta]) -> bool:
        assert self._rules.thoughts is not None
        closing = self._rules.thoughts.closing
        at = self._buffer.find(closing)
        if at >= 0:
            self._thought(self._buffer[:at].rstrip(), deltas)
            self._buffer, self._state = self._buffer[at + len(closing) :], self._after_thought
            self._has_shown = False
            return True
        end = len(self._buffer[: held_from(self._buffer, (closing,))].rstrip())
        self._thought(self._buffer[:end], deltas)
        self._buffer = self._buffer[end:]
        return False

    def _thought(self, text: str, deltas: list[Delta]) -> None:
        text = text if self._has_shown else text.lstrip()
        if text:
            self._has_shown = True
            deltas.append(ReasoningDelta(text))

    def _in_content(self, deltas: list[Delta]) -> bool:
        tools = self._rules.tools
        if tools is None:
            text, self._buffer = self._buffer, ""
            deltas.append(ContentDelta(text))
            return False
        found = first_of(self._buffer, tools.openings)
        end = found[0] if found else held_from(self._buffer, tools.openings)
        self._content(self._buffer[:end], deltas)
        self._buffer = self._buffer[end:]
        if found is None:
            return False
        self._buffer = self._buffer.removeprefix(found[1])
        self._region, self._state = self._reader(tools, found[1]), self._in_call
        return True

    def _content(self, text: str, deltas: list[Delta]) -> None:
        """Show content; the space at its end waits for what follows."""
        if self._drops_space:
            text = text.lstrip()
        if not text:
            return
        self._drops_space = False
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            deltas.append(ContentDelta(shown))

    def _in_call(self, deltas: list[Delta]) -> bool:
        assert self._region is not None
        num_before = self._calls.num
        text, self._buffer = self._buffer, ""
        step = self._region.push(text)
        if self._calls.num > num_before:
            self._space, self._drops_space = "", True
        deltas += step.deltas
        if step.rest is None:
            return False
        self._region, self._state = None, self._in_content
        self._after_region(step, deltas)
        return True

    def _after_region(self, step: Step, deltas: list[Delta]) -> None:
        if step.malformed:
            self._content(step.malformed, deltas)
        self._buffer = (step.rest or "") + self._buffer

    def _reader(self, tools: ToolFormat, opening: str) -> RegionReader:
        if tools.syntax is Syntax.XML:
            return XmlRegion(self._calls, opening=opening, closing=tools.closing)
        if tools.syntax is Syntax.NAMED:
            return NamedRegion(self._calls, opening=opening)
        names = None if tools.opening else self._rules.schemas.keys()
        return JsonRegion(self._calls, opening=opening, closing=tools.closing, names=names)

    def _shown(self, deltas: list[Delta]) -> Sequence[Delta]:
        if self._rules.is_forced:
            deltas = [delta for delta in deltas if not isinstance(delta, ContentDelta)]
        if self._rules.is_parallel:
            return deltas
        return [
            delta for delta in deltas if not (isinstance(delta, ToolCallStart | ArgumentsDelta) and delta.index > 0)
        ]
