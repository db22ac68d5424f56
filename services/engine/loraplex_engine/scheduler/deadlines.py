"""Moments at which requests must be looked at, whatever else happens."""

from __future__ import annotations

import enum
import heapq
import math

from loraplex_engine.scheduler.request import Request, RequestState


class Limit(enum.Enum):
    """What passes at such a moment."""

    DEADLINE = "deadline"
    QUEUE_DEADLINE = "queue_deadline"
    TIME_LIMIT = "time_limit"
    FIRST_TOKEN = "first_token"  # its first token cannot come in time any more, as estimated when it was noted


class Deadlines:
    """A heap of the limits of all open requests; those of ended requests are dropped lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, Limit, Request]] = []
        self._compact_at = 1024

    def add(self, request: Request) -> None:
        """Watch the limits of a new request."""
        submission = request.submission
        for limit, moment_s in (
            (Limit.DEADLINE, submission.deadline_s),
            (Limit.QUEUE_DEADLINE, submission.queue_deadline_s),
            (Limit.TIME_LIMIT, submission.time_limit_at_s),
        ):
            if moment_s is not None:
                self.note(moment_s, limit, request)

    def note(self, moment_s: float, limit: Limit, request: Request) -> None:
        """Watch one more moment of a request."""
        heapq.heappush(self._heap, (moment_s, request.number, limit.value, limit, request))
        if len(self._heap) > self._compact_at:
            self._heap = [entry for entry in self._heap if entry[-1].state is not RequestState.ENDED]
            heapq.heapify(self._heap)
            self._compact_at = max(1024, 2 * len(self._heap))

    @property
    def next_s(self) -> float:
        """The next moment at which something may pass; infinity if there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def pop_passed(self, now_s: float) -> list[tuple[Limit, Request]]:
        """Return and forget the limits that have passed, of requests that have not ended."""
        passed = []
        while self._heap and self._heap[0][0] <= now_s:
            _, _, _, limit, request = heapq.heappop(self._heap)
            if request.state is not RequestState.ENDED:
                passed.append((limit, request))
        return passed
