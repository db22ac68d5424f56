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
    from collections.abc import Callable

    from loraplex_engine.adapter_cache import AdapterCache
    from loraplex_engine.arena import HostArena

Granted = tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Demand:
    digest: str
    num_pages: int
    future: Future[Granted]


class ArenaGrants:
    """Serves demands for slots in the order they came.

    Args:
        is_waited_for: Tells whether a request waits with an adapter: its image stays.
    """

    def __init__(self, *, cache: AdapterCache, arena: HostArena, is_waited_for: Callable[[str], bool]) -> None:
        self._cache = cache
        self._arena = arena
        self._is_waited_for = is_waited_for
        self._demands: deque[_Demand] = deque()

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
                if not self._cache.evict_images(demand.num_pages, lambda digest: not self._is_waited_for(digest)):
                    return
                slots = self._arena.allocate(demand.num_pages)
            self._demands.popleft()
            if demand.future.set_running_or_notify_cancel():
                demand.future.set_result(slots)
            elif slots is not None:
                self._arena.free(slots)

    def cancel(self) -> None:
        """Resolve all demands to None: the engine ends."""
        while self._demands:
            demand = self._demands.popleft()
            if demand.future.set_running_or_notify_cancel():
                demand.future.set_result(None)
