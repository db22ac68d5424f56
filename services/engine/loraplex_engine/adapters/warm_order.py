"""Which adapters to keep on the device although no request asks for them now, and what became of them."""

from __future__ import annotations

import enum
import heapq
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex_engine.messages import ResidencyState

if TYPE_CHECKING:
    from loraplex_engine.adapters.adapter import Adapter


class WarmResult(enum.Enum):
    """What became of an adapter that was loaded before a request asked for it."""

    USEFUL = "useful"  # leased after it had been loaded
    LATE = "late"  # asked for while it was still being loaded
    WASTED = "wasted"  # evicted without a lease


@dataclass(slots=True)
class WarmCounts:
    """Pages of adapters that were loaded before a request asked for them, by what became of them; they only rise."""

    num_useful_pages: int = 0
    num_late_pages: int = 0
    num_wasted_pages: int = 0

    def settle(self, adapter: Adapter, result: WarmResult) -> None:
        """Count, once, what became of an adapter that was loaded before a request asked for it."""
        if not adapter.is_warmed:
            return
        adapter.is_warmed = False
        if result is WarmResult.USEFUL:
            self.num_useful_pages += adapter.num_pages
        elif result is WarmResult.LATE:
            self.num_late_pages += adapter.num_pages
        else:
            self.num_wasted_pages += adapter.num_pages


class WarmOrder:
    """Adapters in the arena that were asked for before, the one worth most first.

    Attributes:
        version: Rises whenever the first adapter may have changed.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Adapter]] = []
        self._serials = itertools.count()
        self._num_members = 0
        self.version = 0

    def place(self, adapter: Adapter) -> None:
        """Add an adapter whose state or worth may have changed."""
        if _is_warmable(adapter):
            self.version += 1
            heapq.heappush(self._heap, (-adapter.worth, next(self._serials), adapter))
            if len(self._heap) > 64 + 2 * self._num_members:
                self._compact()

    @property
    def best(self) -> Adapter | None:
        """The adapter worth most; None if there is none."""
        heap = self._heap
        while heap:
            negated, _, adapter = heap[0]
            if _is_warmable(adapter) and adapter.worth == -negated:
                return adapter
            heapq.heappop(heap)
        return None

    def _compact(self) -> None:
        latest = {a.digest: (-worth, s, a) for worth, s, a in self._heap if _is_warmable(a) and a.worth == -worth}
        self._heap = [(-worth, serial, adapter) for worth, serial, adapter in latest.values()]
        heapq.heapify(self._heap)
        self._num_members = len(self._heap)


def _is_warmable(adapter: Adapter) -> bool:
    return adapter.state is ResidencyState.IN_ARENA and adapter.worth > -math.inf and adapter.may_warm
