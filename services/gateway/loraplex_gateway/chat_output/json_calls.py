"""Calls that are JSON: an object with a name and arguments, or a list of such objects."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

from loraplex_gateway.chat_output.json_span import JsonSpan
from loraplex_gateway.chat_output.regions import NAME, Step, could_begin

if TYPE_CHECKING:
    from collections.abc import Collection

    from loraplex_gateway.chat_output.regions import Calls

MAX_KEY_CHARS: Final = 256
_KEY: Final = re.compile(r'\s*,?\s*"((?:[^"\\]|\\.)*)"\s*:\s*(?=\S)')
_PART_OF_KEY: Final = re.compile(r'\s*,?\s*(?:"(?:[^"\\]|\\.)*(?:\\|"\s*:?\s*)?)?')
_END: Final = re.compile(r"\s*,?\s*}")
ARGUMENTS: Final = ("arguments", "parameters")


class _Object:
    """One call's object, from its brace on."""

    def __init__(self, calls: Calls, names: Collection[str] | None) -> None:
        self._calls = calls
        self._names = names  # None for any
        self._head = ""  # what is not yet taken apart
        self._span: JsonSpan | None = None  # the value that is being read
        self._value: list[str] = []
        self._key = ""
        self._name: str | None = None
        self._early: str | None = None  # arguments that came before the name
        self._is_streaming = False
        self.has_started = False

    def push(self, text: str, step: Step) -> str | None:
        """Take more text; return what is behind the object, or None while it goes on.

        Raises:
            ValueError: If it is no call.
        """
        while True:
            if self._span is not None:
                rest = self._read_value(text, step)
                if rest is None:
                    return None
                text = rest
            self._head, text = self._head + text, ""
            if (end := _END.match(self._head)) is not None:
                self._settle(step)
                return self._head[end.end() :]
            key = _KEY.match(self._head)
            if key is None:
                if len(self._head) > MAX_KEY_CHARS or not _PART_OF_KEY.fullmatch(self._head):
                    raise ValueError("no member")
                return None
            self._begin_value(json.loads(f'"{key[1]}"', strict=False), step, first=self._head[key.end()])
            text, self._head = self._head[key.end() :], ""

    def _begin_value(self, key: str, step: Step, *, first: str) -> None:
        self._key, self._span, self._value = key, JsonSpan(), []
        is_arguments = key in ARGUMENTS
        if is_arguments and (self.has_started or self._early is not None or first not in '{"n'):
            raise ValueError("no arguments")
        if is_arguments and self._name is not None and first == "{":
            self._start(step)
            self._is_streaming = True

    def _read_value(self, text: str, step: Step) -> str | None:
        assert self._span is not None
        end = self._span.end(text)
        piece = text if end is None else text[:end]
        if self._is_streaming:
            if piece:
                step.deltas.append(self._calls.arguments(piece))
        else:
            self._value.append(piece)
        if end is None:
            return None
        self._span = None
        if not self._is_streaming:
            self._keep("".join(self._value), step)
        self._is_streaming = False
        return text[end:]

    def _keep(self, value: str, step: Step) -> None:
        if self._key == "name":
            name = json.loads(value, strict=False)
            if not isinstance(name, str) or not NAME.fullmatch(name) or self._name is not None:
                raise ValueError("no name")
            if self._names is not None and name not in self._names:
                raise ValueError("no function of this request")
            self._name = name
        elif self._key in ARGUMENTS:
            self._early = _arguments(value)
        if self._name is not None and self._early is not None and not self.has_started:
            self._start(step)
            step.deltas.append(self._calls.arguments(self._early))

    def _start(self, step: Step) -> None:
        assert self._name is not None
        self.has_started = True
        step.deltas.append(self._calls.start(self._name))

    def _settle(self, step: Step) -> None:
        """End the object: a call without arguments has none."""
        if self._name is None:
            raise ValueError("no name")
        if not self.has_started:
            self._start(step)
            step.deltas.append(self._calls.arguments("{}"))


def _arguments(value: str) -> str:
    """Return arguments that came as something else than an object behind the name: null, or their text as a string."""
    parsed = json.loads(value, strict=False)
    if parsed is None:
        return "{}"
    if isinstance(parsed, dict):
        return value
    if not isinstance(parsed, str) or not isinstance(json.loads(parsed or "{}"), dict):
        raise ValueError("arguments are no object")
    return parsed or "{}"


class JsonRegion:
    """A region of such calls.

    Args:
        calls: Where they are counted.
        opening: What has opened it, part of the text if it is no call.
        closing: What ends it; empty for nothing.
        names: Functions that may be called; None for any.
    """

    def __init__(self, calls: Calls, *, opening: str, closing: str, names: Collection[str] | None = None) -> None:
        self._calls = calls
        self._closing = closing
        self._names = names
        self._opening = opening
        self._raw = ""  # behind the opening or the last call: what is shown if it is no call
        self._object: _Object | None = None
        self._buffer = ""
        self._is_list = self._had_list = False
        self._num = 0

    def push(self, text: str) -> Step:
        """Take more text."""
        step = Step()
        if self._object is not None:
            text = self._push_object(text, step) or ""
        if self._object is None and step.rest is None:
            self._buffer += text
            self._between(step)
        return step

    def finish(self) -> Step:
        """Return what is no call although it began as one."""
        is_call = self._object.has_started if self._object is not None else self._num > 0
        return Step(rest="") if is_call else self._no_call(self._buffer)

    def _push_object(self, text: str, step: Step) -> str | None:
        assert self._object is not None
        try:
            rest = self._object.push(text, step)
        except (ValueError, RecursionError):
            has_started, self._object = self._object.has_started, None
            none = self._no_call(text)
            step.rest, step.malformed = ("", "") if has_started else (none.rest, none.malformed)
            return None
        if not self._object.has_started:
            self._raw += text
        if rest is not None:
            self._object, self._raw = None, ""
            self._num += 1
        return rest

    def _no_call(self, text: str) -> Step:
        """Return the region's text as what it is instead of a call."""
        return Step(rest=self._raw + text, malformed="" if self._num else self._opening)

    def _between(self, step: Step) -> None:
        """Go on where no object is open."""
        while step.rest is None and self._object is None:
            text = self._buffer.lstrip()
            if not text:
                return
            if text[0] == "{" and (self._is_list or not self._had_list):
                self._raw += self._buffer[: len(self._buffer) - len(text) + 1]
                self._buffer, self._object = "", _Object(self._calls, self._names)
                rest = self._push_object(text[1:], step)
                self._buffer = rest if rest is not None and step.rest is None else ""
            elif text[0] == "[" and not self._num and not self._is_list:
                self._take(text, 1)
                self._is_list = self._had_list = True
            elif text[0] in ",;" and self._num and (self._is_list or not self._had_list):
                self._take(text, 1)
            elif text[0] == "]" and self._is_list and self._num:
                self._take(text, 1)
                self._is_list = False
            elif not self._close(text, step):
                return

    def _take(self, text: str, num: int) -> None:
        self._raw += self._buffer[: len(self._buffer) - len(text) + num]
        self._buffer = text[num:]

    def _close(self, text: str, step: Step) -> bool:
        """End the region; return False if that needs more text."""
        if self._num and not self._is_list and self._closing:
            if text.startswith(self._closing):
                step.rest = text.removeprefix(self._closing)
                return True
            if could_begin(text, self._closing):
                return False
        if self._num:
            step.rest = text  # what ends it was forgotten
        else:
            none = self._no_call(self._buffer)
            step.rest, step.malformed = none.rest, none.malformed
        return True
