"""What published blocks are worth, and which of those that nobody holds give way first.

What a block is worth is the decayed number of sequences that have left it behind. It is kept as
``log2(sum of 2 ** (t / half_life))`` over those moments: two blocks compare the same way at any later time, so nothing
has to be updated as time passes. Who leaves a block leaves all blocks before it at the same moment, so a block is never
worth more than its predecessor, and of equals the later one goes first: no prefix loses its beginning before its end.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_engine.pages.page_pool import NO_PAGES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.pages.page_pool import PagePool, Pages
    from loraplex_engine.pages.page_worth import PageWorth

_DEPTH_STEP: Final = 1e-9
"""What a block's position takes off its worth, in octaves: orders equals, and far above a float's resolution."""
_MAX_DEPTH: Final = 1 << 20
_MIN_CANDIDATES: Final = 512
_MIN_LOOKED_AT: Final = 64


class ColdBlocks:
    """The pool's cached pages, those worth least first.

    Sorting is put off: pages that were left since the last sort are worth at least one use of that moment, so candidates
    of that sort that are worth less still go first.

    Args:
        pool: Whose pages.
        half_life_s: After which a use counts half.
        page_worth: What a block is worth.
    """

    def __init__(self, pool: PagePool, *, half_life_s: float, page_worth: PageWorth) -> None:
        self._pool = pool
        self._half_life_s = half_life_s
        self._page_worth = page_worth
        self._worth = np.full(pool.num_pages, -math.inf)  # in octaves, without `_DEPTH_STEP`
        self._depths = np.zeros(pool.num_pages, dtype=np.int32)
        self._candidates = NO_PAGES  # cached pages when they were sorted, least worth first
        self._candidate_worth: list[float] = []  # with `_DEPTH_STEP`
        self._next = 0  # candidate to look for the first at
        self._num_gone = 0  # leading candidates that were evicted
        self._num_revived = 0  # of the pool, when they were sorted
        self._is_sorted = True  # no other candidate than those revived has become worth more
        self._sure_up_to = math.inf  # no page cached since they were sorted is worth less

    def begin(self, pages: Pages, depths: list[int]) -> None:
        """Take in newly published pages, which hold blocks at some positions of their sequences."""
        self._worth[pages] = -math.inf
        self._depths[pages] = depths

    def count(self, pages: Pages, now_s: float) -> None:
        """Count one use of each page, by a sequence that is about to release them."""
        if self._pool.is_cached(pages).any():  # it computed the same blocks once more, and has no hold on these
            self._is_sorted = False
        moment = now_s / self._half_life_s
        self._worth[pages] = self._page_worth.of_blocks(self._worth[pages], moment)
        self._sure_up_to = min(self._sure_up_to, moment - _DEPTH_STEP * _MAX_DEPTH)

    def worth_of(self, pages: Pages) -> NDArray[np.float64]:
        """Return what pages are worth, in octaves."""
        worth: NDArray[np.float64] = self._worth[pages] - _DEPTH_STEP * self._depths[pages]
        return worth

    def first(self, most: int, up_to: float) -> Pages:
        """Return cached pages that go before all others and are worth at most ``up_to``, as far as they are at hand.

        Args:
            most: Return no more; of those that may go at least one is at hand.
            up_to: Octaves.
        """
        pages, worth = self._first(most)
        return pages[: bisect_right(worth, up_to)]

    def evict(self, pages: Pages) -> None:
        """Have the pool take back pages that `first` has just returned."""
        self._num_gone = self._next + len(pages)
        self._pool.evict(pages)

    @property
    def _is_intact(self) -> bool:
        """True if all candidates but those evicted are cached still, and worth what they were when they were sorted."""
        return self._is_sorted and self._pool.num_revived == self._num_revived

    def _first(self, most: int) -> tuple[Pages, list[float]]:
        """Return the pages that go first and their worth, up to ``most`` and at least one if any is cached."""
        window = max(most, _MIN_LOOKED_AT)
        for begin in range(self._next, len(self._candidates), window):
            if self._is_intact:
                first = max(begin, self._num_gone)
                end = min(begin + window, first + most, bisect_left(self._candidate_worth, self._sure_up_to))
                if first < end:
                    self._next = first
                    return self._candidates[first:end], self._candidate_worth[first:end]
            else:
                pages = self._candidates[begin : begin + window]
                worth = self.worth_of(pages)
                still = (self._pool.is_cached(pages) & (worth < self._sure_up_to)).nonzero()[0]
                if len(still):
                    self._next = begin + int(still[0])  # those before it are gone or have become worth more
                    return pages[still[:most]], worth[still[:most]].tolist()
        self._sort(max(most, _MIN_CANDIDATES))
        return self._candidates[:most], self._candidate_worth[:most]

    def _sort(self, most: int) -> None:
        cached = self._pool.cached_pages
        worth = self.worth_of(cached)
        if len(cached) > most:
            lowest = np.argpartition(worth, most - 1)[:most]
            cached, worth = cached[lowest], worth[lowest]
        order = np.argsort(worth, kind="stable")
        self._candidates, self._candidate_worth = cached[order], worth[order].tolist()
        self._next = self._num_gone = 0
        self._num_revived = self._pool.num_revived
        self._is_sorted = True
        self._sure_up_to = math.inf
