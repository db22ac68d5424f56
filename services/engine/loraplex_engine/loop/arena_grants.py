"""Grants arena slots to images on offer, and decides which images are evicted for them.

It belongs to the step loop's thread, as an eviction from the arena changes residency; only the allocator below is
thread-safe. A *wanted* image waits its turn for room, the image needed first before the others. An unsolicited image
gets room that is free now, or none.
"""

from __future__ import annotations

import heapq
import itertools
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loraplex_engine.messages import ResidencyState

if TYPE_CHECKING:
    from loraplex_engine.adapters.arena import HostArena
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.scheduler.waiting_queue import WaitingQueue

Granted = tuple[int, ...] | None


@dataclass(frozen=True, slots=True, order=True)
class _Demand:
    due_s: float
    number: int
    digest: str = field(compare=False)
    num_pages: int = field(compare=False)
    future: Future[Granted] = field(compare=False)


class ArenaGrants:
    """Serves demands for slots in the order of `Adapter.due_s`; no later demand overtakes one that finds no room.

    Args:
        queue: Waiting requests; an image that a request waits with is not evicted.
    """

    def __init__(self, *, cache: AdapterCache, arena: HostArena, queue: WaitingQueue) -> None:
        self._cache = cache
        self._arena = arena
        self._queue = queue
        self._demands: list[_Demand] = []  # a heap
        self._num_hastened = 0
        self._numbers = itertools.count()
        self._full_at: tuple[int, int, int] | None = None  # `_now()` when the most urgent demand found no room

    def ask(self, digest: str, num_pages: int, *, is_wanted: bool, future: Future[Granted]) -> None:
        """Resolve ``future`` to slots now or later, or to None if there is no room or the image is not needed."""
        if is_wanted and num_pages <= self._arena.num_slots:
            demand = _Demand(self._cache.states.due_s(digest), next(self._numbers), digest, num_pages, future)
            heapq.heappush(self._demands, demand)
            if self._demands[0] is demand:
                self._full_at = None  # the demand that found no room was another
            self.serve()
        elif future.set_running_or_notify_cancel():
            has_image = self._cache.states.status(digest).is_in_arena
            future.set_result(None if has_image else self._arena.allocate(num_pages))

    def serve(self) -> None:
        """Grant the demands that there is room for now, the most urgent first."""
        if self._num_hastened != self._cache.states.num_hastened:
            self._reorder()
        while self._demands:
            demand = self._demands[0]
            slots: Granted = None
            if not demand.future.cancelled() and self._cache.state_of(demand.digest) is ResidencyState.WANTED:
                if not self._make_room(demand.num_pages):
                    return
                slots = self._arena.allocate(demand.num_pages)
            heapq.heappop(self._demands)
            if demand.future.set_running_or_notify_cancel():
                demand.future.set_result(slots)
            elif slots is not None:
                self._arena.free(slots)

    def _reorder(self) -> None:
        """Sort the demands again: a deadline has moved forward; rare, as later requests are mostly due later."""
        self._num_hastened = self._cache.states.num_hastened
        self._demands = [replace(demand, due_s=self._cache.states.due_s(demand.digest)) for demand in self._demands]
        heapq.heapify(self._demands)
        self._full_at = None

    def _make_room(self, num_slots: int) -> bool:
        """Evict images that no request waits with; not tried again before something has changed."""
        if self._full_at == self._now():
            return False
        has_room = self._cache.evict_images(num_slots, lambda adapter: not self._queue.is_awaited(adapter.digest))
        self._full_at = None if has_room else self._now()
        return has_room

    def _now(self) -> tuple[int, int, int]:
        return self._cache.states.sequence, self._queue.version, self._arena.num_free

    def cancel(self) -> None:
        """Resolve all demands to None, as the engine ends."""
        while self._demands:
            demand = self._demands.pop()
            if demand.future.set_running_or_notify_cancel():
                demand.future.set_result(None)
