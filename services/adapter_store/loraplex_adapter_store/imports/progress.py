"""How far an import has come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


class Stage(Enum):
    """State of an import."""

    PENDING = 1
    FETCHING = 2
    VALIDATING = 3
    STORING = 4
    DONE = 5


@dataclass(slots=True)
class Progress:
    """Progress of a running import; changed in place, with a call of `on_change` after each change.

    Attributes:
        created_at: When it was asked for, in seconds since the epoch.
    """

    name: str
    stage: Stage = Stage.PENDING
    bytes_done: int = 0
    bytes_total: int = 0
    created_at: float = field(default_factory=time.time)
    on_change: Callable[[], None] = lambda: None

    def advance(self, stage: Stage, *, bytes_done: int | None = None, bytes_total: int | None = None) -> None:
        """Move to a stage."""
        self.stage = stage
        self.bytes_done = self.bytes_done if bytes_done is None else bytes_done
        self.bytes_total = self.bytes_total if bytes_total is None else bytes_total
        self.on_change()
