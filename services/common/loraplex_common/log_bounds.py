"""Limits of the log: the length of a line's values, and how many similar lines untrusted clients can cause."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    import structlog

MAX_VALUE_CHARS: Final = 2_000
# Most similar lines, of level warning or above, in a window; further ones are counted and dropped.
MAX_ALIKE: Final = 50
WINDOW_S: Final = 10.0
MAX_KINDS: Final = 256
_KIND_CHARS: Final = 48


def clip(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Return a line with long values cut to a useful length: a structlog processor."""
    for key, value in event.items():
        if isinstance(value, str) and len(value) > MAX_VALUE_CHARS:
            event[key] = f"{value[:MAX_VALUE_CHARS]}... ({len(value)} characters)"
        elif isinstance(value, list | tuple | dict | set | bytes) and len(text := repr(value)) > MAX_VALUE_CHARS:
            event[key] = f"{text[:MAX_VALUE_CHARS]}... ({len(text)} characters)"
    return event


class Flood(logging.Filter):
    """Drops warnings and errors that come too often, and logs that; lines per request, which are info, always pass.

    Lines are similar if they have one logger and the same beginning; they may differ later, in names and numbers.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line is written; the last line before a pause says that lines are dropped."""
        if record.levelno < logging.WARNING:
            return True
        kind = (record.name, _event(record)[:_KIND_CHARS])
        now = self._clock()
        since, count = self._kinds.pop(kind, (now, 0))
        num_dropped = max(0, count - MAX_ALIKE)
        if now - since >= WINDOW_S:
            since, count = now, 0
        else:
            num_dropped = 0
        self._kinds[kind] = (since, count + 1)
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        if num_dropped:
            _note(record, f"({num_dropped} lines like this were dropped)")
        elif count + 1 == MAX_ALIKE:
            _note(record, f"(more lines like this are dropped for up to {WINDOW_S:.0f} s)")
        return count < MAX_ALIKE


def _event(record: logging.LogRecord) -> str:
    return str(record.msg.get("event", "")) if isinstance(record.msg, dict) else str(record.msg)


def _note(record: logging.LogRecord, note: str) -> None:
    if isinstance(record.msg, dict):
        record.msg["flood"] = note
    else:
        record.msg = f"{record.msg} {note}"
