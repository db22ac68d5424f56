"""Grants arena slots to images on offer, and decides which images are evicted for them.

It belongs to the step loop's thread, as an eviction from the arena changes residency; only the allocator below is
thread-safe. A *wanted* image waits its turn for room, the image needed first before the others. An unsolicited image
gets room that is free now, or none; one that is *expected*, as a label is about to move to it, also the room of images that
no request waits with.

An image that a request waits with is not evicted, so requests with several adapters could fill the arena with images that
each wait for another. Then room is made of images whose requests still lack others; not of those of the request that waits
longest, whose demands go first (ADR 34).
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

    def ask(
        self, digest: str, num_pages: int, *, is_wanted: bool, future: Future[Granted], is_expected: bool = False
    ) -> None:
        """Resolve ``future`` to slots now or later, or to None if there is no room or the image is not needed."""
        if is_wanted and num_pages <= self._arena.num_slots:
            adds_up = any(request.adds_up for request in self._queue.of_adapter(digest))
            self._cache.states.note_size(digest, num_pages, is_news=adds_up)  # together, its adapters may be too large
            demand = _Demand(self._cache.states.due_s(digest), next(self._numbers), digest, num_pages, future)
            heapq.heappush(self._demands, demand)
            if self._demands[0] is demand:
                self._full_at = None  # the demand that found no room was another
            self.serve()
        elif future.set_running_or_notify_cancel():
            has_image = self._cache.states.status(digest).is_in_arena
            if is_expected and not has_image:
                self._make_room_for_expected(num_pages)
            future.set_result(None if has_image else self._arena.allocate(num_pages))

    def serve(self) -> None:
        """Grant the demands that there is room for now, the most urgent first."""
        if self._num_hastened != self._cache.states.num_hastened:
            self._reorder()
        while self._demands and (demand := self._next()) is not None:
            if demand is self._demands[0]:
                heapq.heappop(self._demands)
            else:
                self._demands.remove(demand)
                heapq.heapify(self._demands)
            self._answer(demand)

    def _next(self) -> _Demand | None:
        """Return the demand to answer next, with room for it; None if all must wait until something has changed."""
        first = self._demands[0]
        if not self._is_open(first):
            return first
        if self._full_at == self._now():
            return None
        found = first if self._make_room(first) else self._first_of_oldest()
        self._full_at = self._now() if found is None else None
        return found

    def _first_of_oldest(self) -> _Demand | None:
        """Return a demand of the request with several adapters that waits longest, with room for it; None if there is none."""
        oldest = self._queue.oldest_adding_up
        if oldest is None:
            return None
        own = (each for each in sorted(self._demands) if each.digest in oldest.digests and self._is_open(each))
        return next((each for each in own if self._make_room(each)), None)

    def _answer(self, demand: _Demand) -> None:
        slots = self._arena.allocate(demand.num_pages) if self._is_open(demand) else None
        if demand.future.set_running_or_notify_cancel():
            demand.future.set_result(slots)
        elif slots is not None:
            self._arena.free(slots)

    def _is_open(self, demand: _Demand) -> bool:
        return not demand.future.cancelled() and self._cache.state_of(demand.digest) is ResidencyState.WANTED

    def _reorder(self) -> None:
        """Sort the demands again: a deadline has moved forward; rare, as later requests are mostly due later."""
        self._num_hastened = self._cache.states.num_hastened
        self._demands = [replace(demand, due_s=self._cache.states.due_s(demand.digest)) for demand in self._demands]
        heapq.heapify(self._demands)
        self._full_at = None

    def _make_room(self, demand: _Demand) -> bool:
        """Evict images that no request waits with, then those that may give way to this one."""
        queue, cache = self._queue, self._cache
        if cache.evict_images(demand.num_pages, lambda adapter: not queue.is_awaited(adapter.digest)):
            return True
        if queue.oldest_adding_up is None:
            return False
        return cache.evict_images(demand.num_pages, lambda adapter: self._may_give_way(adapter.digest, demand.digest))

    def _make_room_for_expected(self, num_pages: int) -> None:
        """Evict images that no request waits with, unless wanted images wait for room themselves."""
        if not self._demands and num_pages <= self._arena.num_slots:
            self._cache.evict_images(num_pages, lambda adapter: not self._queue.is_awaited(adapter.digest))

    def _may_give_way(self, digest: str, to: str) -> bool:
        """Tell whether the requests that wait with an image all lack others, and are not the oldest.

        For an image ``to`` that is not the oldest request's, they must not wait with it too.
        """
        oldest, states = self._queue.oldest_adding_up, self._cache.states
        is_oldests = oldest is not None and to in oldest.digests
        return all(
            request is not oldest
            and (is_oldests or to not in request.digests)
            and not states.have_come(request.digests)
            for request in self._queue.of_adapter(digest)
        )

    def _now(self) -> tuple[int, int, int]:
        return self._cache.states.sequence, self._queue.version, self._arena.num_free

    def cancel(self) -> None:
        """Resolve all demands to None, as the engine ends."""
        while self._demands:
            demand = self._demands.pop()
            if demand.future.set_running_or_notify_cancel():
                demand.future.set_result(None)
