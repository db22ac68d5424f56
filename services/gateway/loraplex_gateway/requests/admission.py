"""How many requests run at once and how many may wait; everything beyond is refused with an estimate."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import DrainingError, SaturatedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_gateway.types import Priority

FIRST_SERVICE_TIME_S: Final = 2.0
MIN_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 60.0
# Weight of the newest request in the running mean of service times.
SMOOTHING: Final = 0.1


class Place:
    """One request's place: in the queue, then among the running ones. Owned by the request, which must `leave`."""

    def __init__(self, controller: AdmissionController, priority: Priority, number: int) -> None:
        self._controller = controller
        self.order = (-priority, number)
        self.admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.admitted_at = 0.0

    def __lt__(self, other: Place) -> bool:
        return self.order < other.order

    @property
    def is_admitted(self) -> bool:
        """True once the request may run."""
        return self._controller.is_running(self)

    def give_up(self, error: Exception) -> None:
        """Make the wait for `admitted` end with an error instead."""
        if not self.admitted.done():
            self.admitted.set_exception(error)

    @property
    def position(self) -> int:
        """Requests ahead in the queue."""
        return self._controller.position(self)

    @property
    def estimated_wait_s(self) -> float:
        """Expected wait from now, from the mean service time."""
        return self._controller.estimate_s(self.position + 1)

    def leave(self) -> None:
        """Give the place back, wherever it is; safe to call twice."""
        self._controller.leave(self)


class AdmissionController:
    """Counts the running and the waiting; higher priority goes first, then first come, first served.

    Args:
        max_concurrent: Most requests running at once.
        max_queued: Most requests waiting.
        clock: Monotonic seconds.
    """

    def __init__(self, *, max_concurrent: int, max_queued: int, clock: Callable[[], float]) -> None:
        self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._clock = clock
        self._running: set[Place] = set()
        self._waiting: list[Place] = []  # in the order in which they will be admitted
        self._numbers = itertools.count()
        self._service_time_s = FIRST_SERVICE_TIME_S
        self._is_draining = False

    @property
    def num_running(self) -> int:
        """Requests that run."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return len(self._running) + len(self._waiting)

    def waiting_by_priority(self) -> dict[int, int]:
        """Return the number of waiting requests of each priority."""
        counts: dict[int, int] = {}
        for place in self._waiting:
            counts[-place.order[0]] = counts.get(-place.order[0], 0) + 1
        return counts

    def check_room(self) -> None:
        """Refuse at once what could not even wait, before any work is spent on it.

        Raises:
            SaturatedError: If the queue is full.
            DrainingError: If the gateway is shutting down.
        """
        if self._is_draining:
            raise DrainingError(
                "this gateway is shutting down; try another", drop_reason="rejected-shutting-down", retry_after_s=1.0
            )
        if len(self._running) >= self._max_concurrent and len(self._waiting) >= self._max_queued:
            raise SaturatedError(
                f"the gateway is saturated: {len(self._running)} requests run and {len(self._waiting)} wait, "
                f"of {self._max_concurrent} and {self._max_queued} allowed",
                retry_after_s=self.estimate_s(len(self._waiting) + 1),
                drop_reason="rejected-saturated",
            )

    def enter(self, priority: Priority) -> Place:
        """Return a place, running if there is room, else waiting.

        Raises:
            SaturatedError: If the queue is full.
            DrainingError: If the gateway is shutting down.
        """
        self.check_room()
        place = Place(self, priority, next(self._numbers))
        bisect.insort(self._waiting, place)
        self._admit()
        return place

    def leave(self, place: Place) -> None:
        """Take a place back and let the next in."""
        if place in self._running:
            self._running.remove(place)
            service_time_s = self._clock() - place.admitted_at
            self._service_time_s += SMOOTHING * (service_time_s - self._service_time_s)
            self._admit()
        elif (index := self.position(place)) < len(self._waiting) and self._waiting[index] is place:
            del self._waiting[index]

    def is_running(self, place: Place) -> bool:
        """Return whether a place is among the running ones."""
        return place in self._running

    def position(self, place: Place) -> int:
        """Return how many wait ahead of a place."""
        return bisect.bisect_left(self._waiting, place)

    def estimate_s(self, position: int) -> float:
        """Return the expected time until the request at a position of the queue runs."""
        estimate = self._service_time_s * position / self._max_concurrent
        return min(max(estimate, MIN_RETRY_S), MAX_RETRY_S)

    def drain(self) -> None:
        """Admit nothing new from now on; those that wait still get their turn."""
        self._is_draining = True

    def check_integrity(self) -> None:
        """Raise if the counts do not fit together.

        Raises:
            RuntimeError: If more run than may, or a request waits although there is room.
        """
        if len(self._running) > self._max_concurrent or (self._waiting and len(self._running) < self._max_concurrent):
            raise RuntimeError(f"admission: {len(self._running)} run, {len(self._waiting)} wait")

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_concurrent:
            place = self._waiting.pop(0)
            place.admitted_at = self._clock()
            self._running.add(place)
            if not place.admitted.done():
                place.admitted.set_result(None)
