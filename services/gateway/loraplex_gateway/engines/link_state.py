"""The states of a link to an engine and how they follow each other."""

from __future__ import annotations

import enum
from typing import Final


class LinkState(enum.Enum):
    """Whether a session is up, on which requests can be submitted."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSED = "closed"


TRANSITIONS: Final = {
    LinkState.CONNECTING: {LinkState.OPEN, LinkState.CLOSED},
    LinkState.OPEN: {LinkState.CONNECTING, LinkState.CLOSED},
    LinkState.CLOSED: set(),
}
