"""Moments at which the scheduler must look at a request, whatever else happens."""

from __future__ import annotations

import enum
import heapq
import math
from typing import TYPE_CHECKING

from loraplex_common.errors import DeadlineError, QueueTimeoutError

from loraplex_engine.messages import FinishReason
from loraplex_engine.scheduler.request import Request, RequestState

if TYPE_CHECKING:
    from loraplex_engine.scheduler.feasibility import Feasibility
    from loraplex_engine.scheduler.request_book import RequestBook


class Limit(enum.Enum):
    """Which limit of a request passes at such a moment."""

    DEADLINE = "deadline"
    QUEUE_DEADLINE = "queue_deadline"
    TIME_LIMIT = "time_limit"
    FIRST_TOKEN = "first_token"  # estimate: after it, the first token is late


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


class TimeLimits:
    """Ends requests whose time has passed, and requests whose first token cannot come in time any more.

    Args:
        book: Ends the requests.
        feasibility: Knows when a first token is out of reach.
    """

    def __init__(self, *, book: RequestBook, feasibility: Feasibility) -> None:
        self._book = book
        self._feasibility = feasibility
        self._deadlines = Deadlines()

    @property
    def next_s(self) -> float:
        """When a limit of some request passes next; infinity if none has any."""
        return self._deadlines.next_s

    def watch(self, request: Request) -> None:
        """Watch the limits of a new request."""
        self._deadlines.add(request)
        self._watch_first_token(request)

    def _watch_first_token(self, request: Request) -> None:
        """Look at a request again at the moment from which it misses its objective."""
        unreachable_s = self._feasibility.unreachable_from_s(request)
        if unreachable_s is not None:
            self._deadlines.note(unreachable_s, Limit.FIRST_TOKEN, request)

    def end_overdue(self, now_s: float) -> None:
        """End the requests that have passed one of their limits."""
        for limit, request in self._deadlines.pop_passed(now_s):
            if request.state is RequestState.ENDED:
                continue  # an earlier limit of this turn ended it
            with self._book.answering_for(request, "when a limit of its time passed"):
                self._pass_limit(limit, request, now_s)

    def _pass_limit(self, limit: Limit, request: Request, now_s: float) -> None:
        if limit is Limit.DEADLINE:
            self._book.fail(request, DeadlineError("the client's deadline passed"))
        elif limit is Limit.FIRST_TOKEN:
            if not self._feasibility.end_if_unreachable(request, now_s) and request.state is RequestState.WAITING:
                self._watch_first_token(request)
        elif limit is Limit.TIME_LIMIT:
            self._book.finish(request, FinishReason.TIME_LIMIT)
        elif request.admitted_s is None:
            error = QueueTimeoutError(
                f"no place in a batch within {now_s - request.arrived_s:.3f} s",
                retry_after_s=1.0,
                drop_reason="rejected-ttl-expired",
            )
            self._book.fail(request, error)
