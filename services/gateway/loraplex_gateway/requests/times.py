"""When what happened to a request: each instant is taken once, for its timings, its metrics and its line in the log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class RequestTimes:
    """The instants of one request, in monotonic seconds.

    Args:
        clock: Monotonic seconds.

    Attributes:
        clock: The clock.
        arrived_at: When the request came.
        queued_at: When it asked for a place on this gateway, its prompt tokenized.
        admitted_at: When it got the place.
        started_at: When an engine was known to run it; None until then.
        first_token_at: When its first token came here; None until then.
        last_token_at: When its newest tokens came here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.arrived_at = self.queued_at = self.admitted_at = self.last_token_at = clock()
        self.started_at: float | None = None
        self.first_token_at: float | None = None

    def queued(self) -> None:
        """Note that the request asks for a place."""
        self.queued_at = self.admitted_at = self.last_token_at = self.clock()

    def admitted(self) -> None:
        """Note that the request has its place."""
        self.admitted_at = self.clock()

    def started(self) -> None:
        """Note that an engine runs the request."""
        self.started_at = self.clock()

    def tokens_came(self) -> None:
        """Note that tokens have come."""
        self.last_token_at = self.clock()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at
