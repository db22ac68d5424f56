"""Drains under way: who waits for the last request to end, and until when it may take."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraplex_common.errors import LoraplexError


@dataclass(frozen=True, slots=True)
class Drain:
    """One call that waits.

    Attributes:
        deadline_s: When requests that are still open are ended.
        future: Resolves to how many were.
    """

    deadline_s: float
    future: Future[int]


class Drains:
    """All of them. Belongs to the step loop's thread."""

    def __init__(self) -> None:
        self._drains: list[Drain] = []

    def __bool__(self) -> bool:
        return bool(self._drains)

    @property
    def next_deadline_s(self) -> float:
        """When the first of them is over; infinity if there is none."""
        return min((drain.deadline_s for drain in self._drains), default=math.inf)

    def add(self, drain: Drain) -> None:
        """Begin one."""
        self._drains.append(drain)

    def resolve(self, num_ended: int) -> None:
        """End all: no request is left, and so many were ended before their time."""
        for drain in self._drains:
            if drain.future.set_running_or_notify_cancel():
                drain.future.set_result(num_ended)
        self._drains.clear()

    def fail(self, error: LoraplexError) -> None:
        """End all: nobody will ever know. May be called from any thread once the loop's is not heard of any more."""
        drains, self._drains = self._drains, []
        for drain in drains:
            if drain.future.set_running_or_notify_cancel():
                drain.future.set_exception(error)
