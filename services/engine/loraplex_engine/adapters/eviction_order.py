"""The order in which adapters are evicted when room is needed."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from loraplex_engine.adapters.adapter import Adapter

    _Entry = tuple[float, float, int, Adapter]  # worth, last used, serial


class EvictionOrder:
    """Adapters that may be evicted, the one worth least first; of equals, the least recently used first.

    A heap whose entries are checked when they reach the top, as an adapter's worth may have changed since it was
    pushed.

    Args:
        is_member: Tells whether an adapter may be evicted; called whenever the adapter is placed.

    Attributes:
        num_pages: Pages that evicting all of them would free.
        num_claimed_pages: The part of ``num_pages`` that belongs to adapters which waiting requests claim.
    """

    def __init__(self, is_member: Callable[[Adapter], bool]) -> None:
        self._is_member = is_member
        self._adapters: dict[str, Adapter] = {}
        self._claimed: set[str] = set()
        self._heap: list[_Entry] = []
        self._serials = itertools.count()
        self.num_pages = 0
        self.num_claimed_pages = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def num_pages_of(self, digest: str) -> int:
        """Return the pages of an adapter that may be evicted; 0 for any other."""
        adapter = self._adapters.get(digest)
        return adapter.num_pages if adapter is not None else 0

    def place(self, adapter: Adapter) -> None:
        """Put an adapter at its place, or take it off, by its present state, leases, claims, pin and worth."""
        digest = adapter.digest
        if self._adapters.pop(digest, None) is not None:
            self.num_pages -= adapter.num_pages
        if digest in self._claimed:
            self._claimed.discard(digest)
            self.num_claimed_pages -= adapter.num_pages
        if not self._is_member(adapter):
            return
        self._adapters[digest] = adapter
        self.num_pages += adapter.num_pages
        if adapter.num_claims:
            self._claimed.add(digest)
            self.num_claimed_pages += adapter.num_pages
        heapq.heappush(self._heap, (adapter.worth, adapter.last_used_s, next(self._serials), adapter))
        if len(self._heap) > 64 + 2 * len(self._adapters):
            self._heap = [(a.worth, a.last_used_s, next(self._serials), a) for a in self._adapters.values()]
            heapq.heapify(self._heap)

    @property
    def first(self) -> Adapter | None:
        """The adapter worth least; None if there is none."""
        while self._heap:
            if self._is_current(self._heap[0]):
                return self._heap[0][-1]
            heapq.heappop(self._heap)
        return None

    def _is_current(self, entry: _Entry) -> bool:
        """Tell whether an entry belongs to an adapter that may be evicted, and has its present worth."""
        worth, used_s, _, adapter = entry
        return worth == adapter.worth and used_s == adapter.last_used_s and self._has(adapter)

    def _has(self, adapter: Adapter) -> bool:
        """Tell whether an adapter may be evicted; one that was forgotten and came again is another object."""
        return self._adapters.get(adapter.digest) is adapter

    def in_order(self) -> AdaptersInOrder:
        """Return an iterator over the adapters, those worth least first; they may be evicted while it runs."""
        return AdaptersInOrder(self)

    def pop(self) -> _Entry | None:
        """Take the first entry out, for `put_back`; None if there is none."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry):
                return entry
        return None

    def put_back(self, entry: _Entry) -> None:
        """Put an entry back, unless its adapter may no longer be evicted."""
        if self._has(entry[-1]):
            heapq.heappush(self._heap, entry)

    def choose(self, num_pages: int, may_evict: Callable[[Adapter], bool]) -> list[Adapter] | None:
        """Return the first adapters that may be evicted and together free ``num_pages``; None if all are too few."""
        chosen: list[Adapter] = []
        if num_pages > self.num_pages:
            return None
        with self.in_order() as adapters:
            for adapter in adapters:
                if num_pages <= 0:
                    break
                if may_evict(adapter):
                    chosen.append(adapter)
                    num_pages -= adapter.num_pages
        return chosen if num_pages <= 0 else None

    def check_integrity(self, adapters: list[Adapter]) -> None:
        """Recount.

        Raises:
            RuntimeError: If an adapter is missing or listed wrongly, or cannot be found in the order.
        """
        members = [adapter for adapter in adapters if self._is_member(adapter)]
        names = {adapter.digest for adapter in members}
        pages = sum(adapter.num_pages for adapter in members)
        claimed = sum(adapter.num_pages for adapter in members if adapter.num_claims)
        if names != set(self._adapters) or (pages, claimed) != (self.num_pages, self.num_claimed_pages):
            raise RuntimeError(
                f"{names} may give way with {pages} pages, {set(self._adapters)} are listed with {self.num_pages}"
            )
        found = {entry[-1].digest for entry in self._heap if self._is_current(entry)}  # as it is: `pop` changes it
        if found != names:
            raise RuntimeError(f"{names} may give way, {found} are in the order")


class AdaptersInOrder:
    """Iterates over an `EvictionOrder` and restores it at the end.

    It is a class because a generator-based context manager costs twice as much.

    Args:
        order: The order to iterate over.
    """

    __slots__ = ("_order", "_seen")

    def __init__(self, order: EvictionOrder) -> None:
        self._order = order
        self._seen: dict[str, _Entry] = {}

    def __enter__(self) -> AdaptersInOrder:
        return self

    def __iter__(self) -> AdaptersInOrder:
        return self

    def __next__(self) -> Adapter:
        while (entry := self._order.pop()) is not None:
            adapter = entry[-1]
            if adapter.digest not in self._seen:  # otherwise it is an older entry of equal worth
                self._seen[adapter.digest] = entry
                return adapter
        raise StopIteration

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for entry in self._seen.values():
            self._order.put_back(entry)
