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

    Among stop strings that end at the same character the longest wins. Text before the match is let out;
    the match itself only with `include_stop`; what follows it is dropped.

    A piece may be hidden: a special token that the output has but its text does not show. Stop strings see it in its
    place, as a whole: one that begins or ends inside of it is no match, since the text would not show why the output ended.
    """

    def __init__(self, stop_strings: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = sorted(set(stop_strings), key=len, reverse=True)
        self._include_stop = include_stop
        self._held = ""
        self._hidden: list[tuple[int, int]] = []  # half-open ranges of `_held`

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self._stops)

    @property
    def held(self) -> str:
        """Text held back because it may begin a stop string, hidden pieces included."""
        return self._held

    def push(self, text: str, *, is_shown: bool = True) -> StopResult:
        """Add a piece and return what may go out."""
        if not self._stops:
            return StopResult(text if is_shown else "")
        if not text:
            return StopResult("")
        buffer = self._held + text
        if not is_shown:
            self._hidden.append((len(self._held), len(buffer)))
        if (match := self._first_match(buffer)) is not None:
            _, start, stop = match
            shown = self._shown(buffer, start) + (stop if self._include_stop else "")
            self._held, self._hidden = "", []
            return StopResult(shown, stop)
        keep = self._first_possible_start(buffer)
        shown = self._shown(buffer, keep)
        self._held = buffer[keep:]
        self._hidden = [(low - keep, high - keep) for low, high in self._hidden if low >= keep]
        return StopResult(shown)

    def would_match(self, text: str) -> bool:
        """Return whether this text, added now, completes a stop string."""
        return bool(text) and self._first_match(self._held + text) is not None

    def flush(self) -> str:
        """Return what was held back and is shown; the output ended for another reason."""
        shown = self._shown(self._held, len(self._held))
        self._held, self._hidden = "", []
        return shown

    def _first_match(self, buffer: str) -> tuple[int, int, str] | None:
        """Return (end, start, stop string) of the first one to be complete.

        It ends behind the held part: what was held is only a proper prefix of stop strings.
        """
        matches = []
        for stop in self._stops:
            start = buffer.find(stop)
            while start >= 0 and (self._cuts_hidden(start) or self._cuts_hidden(start + len(stop))):
                start = buffer.find(stop, start + 1)
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        return min(matches, default=None)

    def _first_possible_start(self, buffer: str) -> int:
        """Return where the longest end of the buffer that begins a stop string starts."""
        longest = len(self._stops[0]) - 1
        for start in range(max(0, len(buffer) - longest), len(buffer)):
            if not self._cuts_hidden(start) and any(stop.startswith(buffer[start:]) for stop in self._stops):
                return start
        return len(buffer)

    def _cuts_hidden(self, position: int) -> bool:
        return any(low < position < high for low, high in self._hidden)

    def _shown(self, buffer: str, end: int) -> str:
        """Return the buffer up to `end` less its hidden pieces."""
        if not self._hidden:
            return buffer[:end]
        pieces, at = [], 0
        for low, high in self._hidden:
            if low >= end:
                break
            pieces.append(buffer[at:low])
            at = high
        return "".join([*pieces, buffer[at:end]])
