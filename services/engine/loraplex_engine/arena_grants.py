"""Who gets arena slots for images on offer, and which images give way.

Belongs to the step loop's thread, as eviction from the arena is a matter of residency; only the allocator below is
thread-safe. A *wanted* image waits its turn for room; an unsolicited one gets idle room or nothing.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_engine.messages import ResidencyState

if TYPE_CHECKING:
    from loraplex_engine.adapter_cache import AdapterCache
    from loraplex_engine.arena import HostArena
    from loraplex_engine.waiting_queue import WaitingQueue

Granted = tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Demand:
    digest: str
    num_pages: int
    future: Future[Granted]


class ArenaGrants:
    """Serves demands for slots in the order they came.

    Args:
        queue: Waiting requests; an image that one waits with stays.
    """

    def __init__(self, *, cache: AdapterCache, arena: HostArena, queue: WaitingQueue) -> None:
        self._cache = cache
        self._arena = arena
        self._queue = queue
        self._demands: deque[_Demand] = deque()
        self._full_at: tuple[int, int, int] | None = None  # what held when the first demand found no room

    def ask(self, digest: str, num_pages: int, *, is_wanted: bool, future: Future[Granted]) -> None:
        """Resolve ``future`` to slots now or later, or to None if there is no room or no use for the image."""
        if is_wanted and num_pages <= self._arena.num_slots:
            self._demands.append(_Demand(digest, num_pages, future))
            self.serve()
        elif future.set_running_or_notify_cancel():
            has_image = self._cache.status(digest).is_in_arena
            future.set_result(None if has_image else self._arena.allocate(num_pages))

    def serve(self) -> None:
        """Grant what there is room for by now; the first demand is never overtaken."""
        while self._demands:
            demand = self._demands[0]
            slots: Granted = None
            if not demand.future.cancelled() and self._cache.state_of(demand.digest) is ResidencyState.WANTED:
                if not self._make_room(demand.num_pages):
                    return
                slots = self._arena.allocate(demand.num_pages)
            self._demands.popleft()
            if demand.future.set_running_or_notify_cancel():
                demand.future.set_result(slots)
            elif slots is not None:
                self._arena.free(slots)

    def _make_room(self, num_slots: int) -> bool:
        """Evict images that nobody waits with; not tried again before something has changed."""
        now = (self._cache.sequence, self._queue.version, self._arena.num_free)
        if now == self._full_at:
            return False
        has_room = self._cache.evict_images(num_slots, lambda adapter: not self._queue.is_awaited(adapter.digest))
        self._full_at = None if has_room else (self._cache.sequence, self._queue.version, self._arena.num_free)
        return has_room

    def cancel(self) -> None:
        """Resolve all demands to None: the engine ends."""
        while self._demands:
            demand = self._demands.popleft()
            if demand.future.set_running_or_notify_cancel():
                demand.future.set_result(None)
