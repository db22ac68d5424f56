"""Finds where a JSON value ends, however its text is cut into pieces."""

from __future__ import annotations

import re
from typing import Final

_STRUCTURE: Final = re.compile(r'["{}\[\]]')
_IN_STRING: Final = re.compile(r'["\\]')
_AFTER_SCALAR: Final = re.compile(r"[\s,}\]<]")


class JsonSpan:
    """One value, begun with its first character. It looks at brackets and quotes only, at each character once."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_string = self._is_escaped = self._is_scalar = self._has_begun = False

    def end(self, text: str) -> int | None:
        """Return where the value ends in the next piece of text, half-open; None if it goes on."""
        at = 0
        if not self._has_begun and text:
            self._has_begun = True
            self._is_scalar = text[0] not in '"{['
        if self._is_scalar:
            found = _AFTER_SCALAR.search(text)
            return found.start() if found else None
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            found = (_IN_STRING if self._is_string else _STRUCTURE).search(text, at)
            if found is None:
                return None
            at = found.end()
            self._see(found[0])
            if not self._is_string and self._depth == 0:
                return at
        return None

    def _see(self, character: str) -> None:
        if character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._is_string = not self._is_string
        else:
            self._depth += 1 if character in "{[" else -1
