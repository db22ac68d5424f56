"""Drains under way: the calls that wait for the last request to end, and until when it may take."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_common.errors import LoraplexError


@dataclass(frozen=True, slots=True)
class Drain:
    """One call that waits for a drain.

    Attributes:
        deadline_s: When requests that are still open are ended.
        future: Resolves to the number of requests that were ended so.
    """

    deadline_s: float
    future: Future[int]


class Drains:
    """All drains under way. Belongs to the step loop's thread."""

    def __init__(self) -> None:
        self._drains: list[Drain] = []

    def __bool__(self) -> bool:
        return bool(self._drains)

    @property
    def next_deadline_s(self) -> float:
        """When the first drain is over; infinity if there is none."""
        return min((drain.deadline_s for drain in self._drains), default=math.inf)

    def add(self, drain: Drain) -> None:
        """Begin a drain."""
        self._drains.append(drain)

    def resolve(self, num_ended: int) -> None:
        """End all drains: no request is left, and ``num_ended`` requests were ended before their time."""
        for drain in self._drains:
            if drain.future.set_running_or_notify_cancel():
                drain.future.set_result(num_ended)
        self._drains.clear()

    def fail(self, error: LoraplexError) -> None:
        """End all drains with an error. Any thread may call this once the loop's thread runs no more or hangs."""
        drains, self._drains = self._drains, []
        for drain in drains:
            if drain.future.set_running_or_notify_cancel():
                drain.future.set_exception(error)
