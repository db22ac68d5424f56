"""Calls as newer Mistral models write them: ``[TOOL_CALLS]NAME[ARGS]{...}``; lists of objects are read, too."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from loraplex_gateway.chat_output.json_calls import JsonRegion
from loraplex_gateway.chat_output.json_span import JsonSpan
from loraplex_gateway.chat_output.regions import Step

if TYPE_CHECKING:
    from loraplex_gateway.chat_output.regions import Calls, RegionReader

MAX_HEAD_CHARS: Final = 256
_HEAD: Final = re.compile(r"\s*([A-Za-z0-9_.-]{1,128})\s*(?:\[CALL_ID\]\s*[A-Za-z0-9_-]*\s*)?(?:\[ARGS\]\s*)?(?={)")
_PART_OF_HEAD: Final = re.compile(r"\s*[A-Za-z0-9_.-]*\s*(?:\[[A-Z_]*(?:\][\sA-Za-z0-9_-]*)?){0,2}")


class NamedRegion:
    """One call behind its opening.

    Args:
        calls: Where they are counted.
        opening: What has opened it.
    """

    def __init__(self, calls: Calls, *, opening: str) -> None:
        self._calls = calls
        self._opening = opening
        self._head = ""
        self._json: RegionReader | None = None
        self._span: JsonSpan | None = None

    def push(self, text: str) -> Step:
        """Take more text."""
        if self._json is not None:
            return self._json.push(text)
        step = Step()
        if self._span is None:
            self._head += text
            if self._head.lstrip()[:1] in ("[", "{"):
                self._json = JsonRegion(self._calls, opening=self._opening, closing="")
                return self._json.push(self._head)
            head = _HEAD.match(self._head)
            if head is None:
                if len(self._head) > MAX_HEAD_CHARS or not _PART_OF_HEAD.fullmatch(self._head):
                    step.rest, step.malformed = self._head, self._opening
                return step
            self._span = JsonSpan()
            step.deltas.append(self._calls.start(head[1]))
            text = self._head[head.end() :]
        end = self._span.end(text)
        piece = text if end is None else text[:end]
        if piece:
            step.deltas.append(self._calls.arguments(piece))
        if end is not None:
            step.rest = text[end:]
        return step

    def finish(self) -> Step:
        """Return what is no call although it began as one."""
        if self._json is not None:
            return self._json.finish()
        return Step(rest="") if self._span is not None else Step(rest=self._head, malformed=self._opening)
