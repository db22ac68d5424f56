"""The states of an engine session and how they follow each other."""

from __future__ import annotations

import enum
from typing import Final


class SessionState(enum.Enum):
    """Whether requests can be submitted."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSED = "closed"


TRANSITIONS: Final = {
    SessionState.CONNECTING: {SessionState.OPEN, SessionState.CLOSED},
    SessionState.OPEN: {SessionState.CONNECTING, SessionState.CLOSED},
    SessionState.CLOSED: set(),
}
