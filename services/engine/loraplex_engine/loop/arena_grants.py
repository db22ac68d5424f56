"""Who gets arena slots for images on offer, and which images give way.

Belongs to the step loop's thread, as eviction from the arena is a matter of residency; only the allocator below is
thread-safe. A *wanted* image waits its turn for room, the one needed first before the others; an unsolicited one gets idle
room or nothing.
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
    """Serves demands for slots in the order of `Adapter.due_s`; none that is due later overtakes one that finds no room.

    Args:
        queue: Waiting requests; an image that one waits with stays.
    """

    def __init__(self, *, cache: AdapterCache, arena: HostArena, queue: WaitingQueue) -> None:
        self._cache = cache
        self._arena = arena
        self._queue = queue
        self._demands: list[_Demand] = []  # a heap
        self._num_hastened = 0
        self._numbers = itertools.count()
        self._full_at: tuple[int, int, int] | None = None  # what held when the most urgent demand found no room

    def ask(self, digest: str, num_pages: int, *, is_wanted: bool, future: Future[Granted]) -> None:
        """Resolve ``future`` to slots now or later, or to None if there is no room or no use for the image."""
        if is_wanted and num_pages <= self._arena.num_slots:
            demand = _Demand(self._cache.states.due_s(digest), next(self._numbers), digest, num_pages, future)
            heapq.heappush(self._demands, demand)
            if self._demands[0] is demand:
                self._full_at = None  # what found no room was another
            self.serve()
        elif future.set_running_or_notify_cancel():
            has_image = self._cache.states.status(digest).is_in_arena
            future.set_result(None if has_image else self._arena.allocate(num_pages))

    def serve(self) -> None:
        """Grant what there is room for by now."""
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
        """Some deadline was moved forward, which is rare: whoever asks later is mostly due later."""
        self._num_hastened = self._cache.states.num_hastened
        self._demands = [replace(demand, due_s=self._cache.states.due_s(demand.digest)) for demand in self._demands]
        heapq.heapify(self._demands)
        self._full_at = None

    def _make_room(self, num_slots: int) -> bool:
        """Evict images that nobody waits with; not tried again before something has changed."""
        if self._full_at == self._now():
            return False
        has_room = self._cache.evict_images(num_slots, lambda adapter: not self._queue.is_awaited(adapter.digest))
        self._full_at = None if has_room else self._now()
        return has_room

    def _now(self) -> tuple[int, int, int]:
        return self._cache.states.sequence, self._queue.version, self._arena.num_free

    def cancel(self) -> None:
        """Resolve all demands to None: the engine ends."""
        while self._demands:
            demand = self._demands.pop()
            if demand.future.set_running_or_notify_cancel():
                demand.future.set_result(None)
