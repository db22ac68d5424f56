"""PEFT's rules for matching module names, with a time limit: the patterns come from strangers.

Python's own `re` can be sent into exponential time by a pattern and holds the interpreter's lock meanwhile; `regex`
takes a timeout. Source of the rules: PEFT 0.21, `get_pattern_key` and `check_target_module_exists`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import regex
from loraplex_common.errors import AdapterIncompatibleError

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_PATTERN_CHARS: Final = 1000
BUDGET_S: Final = 5.0


class PatternMatcher:
    """Matches the patterns of one checkpoint within one budget of time.

    Args:
        budget_s: Seconds for all matches together.
    """

    def __init__(self, budget_s: float = BUDGET_S) -> None:
        self._deadline = time.monotonic() + budget_s
        self._compiled: dict[str, Any] = {}

    def fullmatch(self, pattern: str, key: str, *, setting: str) -> bool:
        """Return whether the whole of ``key`` matches; ``setting`` names the pattern's place for messages."""
        return self._match(pattern, key, setting, whole=True) is not None

    def layer_index(self, layers_pattern: str, key: str) -> int | None:
        """Return the first number that follows a part of ``key`` matching ``layers_pattern``."""
        found = self._match(rf"(?:^|.*?\.){layers_pattern}\.(?P<idx>\d+)\.", key, "layers_pattern", whole=False)
        return int(found.groupdict()["idx"]) if found else None

    def first_suffix_match(self, patterns: Iterable[str], key: str, *, setting: str) -> str | None:
        """Return the first pattern that matches the end of ``key`` at a dot, as PEFT's `get_pattern_key` does."""
        for pattern in patterns:
            if pattern == key or self._match(rf"(.*\.)?({pattern})$", key, setting, whole=False):
                return pattern
        return None

    def _match(self, pattern: str, key: str, setting: str, *, whole: bool) -> Any:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise AdapterIncompatibleError(f"{setting}: matching its patterns takes too long")
        try:
            compiled = self._compiled.get(pattern)
            if compiled is None:
                if len(pattern) > MAX_PATTERN_CHARS:
                    raise AdapterIncompatibleError(
                        f"{setting}: a pattern is longer than {MAX_PATTERN_CHARS} characters"
                    )
                compiled = self._compiled[pattern] = regex.compile(pattern)
            match = compiled.fullmatch if whole else compiled.match
            return match(key, timeout=remaining)
        except regex.error as error:
            raise AdapterIncompatibleError(f"{setting}: {pattern[:200]!r} is no regular expression: {error}") from error
        except TimeoutError as error:
            raise AdapterIncompatibleError(f"{setting}: matching {pattern[:200]!r} takes too long") from error
