"""Stop strings over a stream of text: nothing that may become part of one is let out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class StopResult:
    """Text that may go out now, and the stop string that ended the output, if one did."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Finds the first place where any stop string is complete, however the text is cut into pieces.

    Of several stop strings that end at the same character the longest wins. Text before the match is let out;
    the match itself only with `include_stop`; what follows it is dropped.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = sorted(set(stop_strings), key=len, reverse=True)
        self._include_stop = include_stop
        self._held = ""

    @property
    def held(self) -> str:
        """Text held back because it may begin a stop string."""
        return self._held

    def push(self, text: str) -> StopResult:
        """Add text and return what may go out."""
        if not self._stops or not text:
            return StopResult(text)
        buffer = self._held + text
        # A match ends after the held part: what was held is only a proper prefix of every stop string.
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if matches:
            end, start, stop = min(matches)
            self._held = ""
            return StopResult(buffer[: end if self._include_stop else start], stop)
        keep = self._longest_prefix_at_end(buffer)
        self._held = buffer[len(buffer) - keep :]
        return StopResult(buffer[: len(buffer) - keep])

    def flush(self) -> str:
        """Return what was held back; the output ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _longest_prefix_at_end(self, buffer: str) -> int:
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest
