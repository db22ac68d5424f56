"""Calls as Qwen3-Coder writes them: ``<function=NAME>`` with one ``<parameter=KEY>`` for each argument."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn

from loraplex_gateway.chat_output.json_calls import JsonRegion
from loraplex_gateway.chat_output.regions import NAME, Step, could_begin, first_of, held_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loraplex_gateway.chat_output.regions import Calls, RegionReader

FUNCTION: Final = "<function="
PARAMETER: Final = "<parameter="
END_OF_PARAMETER: Final = "</parameter>"
END_OF_FUNCTION: Final = "</function>"
MAX_NAME_CHARS: Final = 256
# What ends a value; the last two where its own end was forgotten.
_ENDS: Final = (
    *(f"\n{END_OF_PARAMETER}", END_OF_PARAMETER),
    *(f"\n{PARAMETER}", f"\n{END_OF_FUNCTION}"),
)
_LITERALS: Final = {"true": True, "false": False, "none": None, "null": None}
_KEY: Final = re.compile(r"[^<>\n]{1,256}")


class XmlRegion:
    """One call, behind its ``<tool_call>`` or ``<function=``; an object behind the former is read as JSON.

    Args:
        calls: Where they are counted.
        opening: What has opened it.
        closing: What ends it.
    """

    def __init__(self, calls: Calls, *, opening: str, closing: str) -> None:
        self._calls = calls
        self._opening = opening
        self._closing = closing if opening != FUNCTION else ""
        self._raw = ""
        self._buffer = FUNCTION if opening == FUNCTION else ""
        self._json: RegionReader | None = None
        self._step = Step()
        self._state = self._expect_function
        self._properties: Mapping[str, Any] = {}
        self._types: frozenset[str] = frozenset()
        self._num_parameters = 0
        self._value = ""  # of a parameter that is no string
        self._has_started = self._has_value = False

    def push(self, text: str) -> Step:
        """Take more text."""
        if self._json is not None:
            return self._json.push(text)
        self._step = Step()
        self._buffer += text
        if not self._has_started:
            self._raw += text
        while self._step.rest is None and self._json is None and self._state():
            pass
        return self._step

    def finish(self) -> Step:
        """Return what is no call although it began as one; a call that was cut stays cut."""
        if self._json is not None:
            return self._json.finish()
        return Step(rest="") if self._has_started else Step(rest=self._raw, malformed=self._opening)

    def _malformed(self) -> bool:
        self._step.rest, self._step.malformed = self._raw, self._opening
        return False

    def _expect_function(self) -> bool:
        text = self._buffer.lstrip()
        if not text:
            return False
        if text[0] == "{" and self._opening != FUNCTION:
            self._json = JsonRegion(self._calls, opening=self._opening, closing=self._closing)
            self._step = self._json.push(self._raw)
            return False
        if not could_begin(text, FUNCTION):
            return self._malformed()
        if not text.startswith(FUNCTION):
            return False
        name, found, rest = text.removeprefix(FUNCTION).partition(">")
        if not found:
            return self._malformed() if len(name) > MAX_NAME_CHARS else False
        if not NAME.fullmatch(name):
            return self._malformed()
        self._has_started, self._buffer = True, rest
        properties = self._calls.schemas.get(name, {}).get("properties")
        self._properties = properties if isinstance(properties, dict) else {}
        self._step.deltas += [self._calls.start(name), self._calls.arguments("{")]
        self._state = self._expect_parameter
        return True

    def _expect_parameter(self) -> bool:
        text = self._buffer.lstrip()
        if text.startswith(END_OF_FUNCTION):
            self._step.deltas.append(self._calls.arguments("}"))
            self._buffer, self._state = text.removeprefix(END_OF_FUNCTION), self._expect_end
            return True
        if text.startswith(PARAMETER):
            return self._begin_parameter(text)
        if any(item.startswith(text) for item in (END_OF_FUNCTION, PARAMETER)):
            return False
        self._step.deltas.append(self._calls.arguments("}"))  # the function's end was forgotten
        self._buffer, self._state = text, self._expect_end
        return True

    def _begin_parameter(self, text: str) -> bool:
        key, found, rest = text.removeprefix(PARAMETER).partition(">")
        if not found and len(key) <= MAX_NAME_CHARS:
            return False
        if not found or not _KEY.fullmatch(key):
            self._step.deltas.append(self._calls.arguments("}"))
            self._buffer, self._state = text.removeprefix(PARAMETER), self._expect_end
            return True
        self._types = _types(self._properties.get(key))
        comma = ", " if self._num_parameters else ""
        quote = '"' if self._is_text else ""
        self._step.deltas.append(self._calls.arguments(f"{comma}{json.dumps(key, ensure_ascii=False)}: {quote}"))
        self._num_parameters += 1
        self._buffer, self._value, self._has_value, self._state = rest, "", False, self._in_value
        return True

    @property
    def _is_text(self) -> bool:
        return self._types <= {"string"}

    def _in_value(self) -> bool:
        if not self._has_value:  # the line break behind the tag is none of its text
            if not self._buffer:
                return False
            self._buffer, self._has_value = self._buffer.removeprefix("\n"), True
        found = first_of(self._buffer, _ENDS)
        end = found[0] if found else held_from(self._buffer, _ENDS)
        self._more(self._buffer[:end])
        if found is None:
            self._buffer = self._buffer[end:]
            return False
        rest = self._buffer[end + len(found[1]) :]
        self._buffer = rest if found[1].endswith(END_OF_PARAMETER) else found[1].lstrip("\n") + rest
        self._step.deltas.append(self._calls.arguments('"' if self._is_text else _typed(self._value, self._types)))
        self._state = self._expect_parameter
        return True

    def _more(self, text: str) -> None:
        if not self._is_text:
            self._value += text
        elif text:
            self._step.deltas.append(self._calls.arguments(json.dumps(text, ensure_ascii=False)[1:-1]))

    def _expect_end(self) -> bool:
        text = self._buffer.lstrip()
        if self._closing and could_begin(text, self._closing):
            if not text.startswith(self._closing):
                return False
            text = text.removeprefix(self._closing)
        self._step.rest = text
        return False


def _types(schema: Any) -> frozenset[str]:
    """Return the types that a parameter may have; none that are known means text."""
    if not isinstance(schema, dict):
        return frozenset()
    named = schema.get("type", ())
    types = {named} if isinstance(named, str) else {item for item in named if isinstance(item, str)}
    for key in ("anyOf", "oneOf"):
        alternatives = schema.get(key)
        types.update(*(_types(item) for item in alternatives) if isinstance(alternatives, list) else ())
    return frozenset(types)


def _typed(text: str, types: frozenset[str]) -> str:
    """Return the JSON of a value that need not be a string."""
    stripped = text.strip()
    literal = stripped.lower()
    if literal in _LITERALS and ({"boolean", "null"} & types):
        return json.dumps(_LITERALS[literal])
    try:
        value = json.loads(stripped, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if "string" in types and not isinstance(value, dict | list):
        return json.dumps(text, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
