"""What published blocks are worth, and which of the blocks without a holder are evicted first.

A block is worth the decayed number of sequences that have left it behind, kept as ``log2(sum of 2 ** (t / half_life))``
over the moments t of leaving: two blocks compare the same way at any later time, so nothing is updated as time passes. A
sequence that leaves a block leaves all blocks before it at the same moment, so a block is never worth more than its
predecessor. If two blocks are worth the same, the later one is evicted first, so no prefix loses its beginning before its
end.
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
"""What a block's position takes off its worth, in octaves: it orders equals, and is far above a float's resolution."""
_MAX_DEPTH: Final = 1 << 20
_MIN_CANDIDATES: Final = 512
_MIN_LOOKED_AT: Final = 64


class ColdBlocks:
    """The pool's cached pages, those worth least first.

    Pages are sorted rarely. A page left since the last sort is worth at least one use at that moment, so candidates of
    the last sort that are worth less are still evicted before it.

    Args:
        pool: The pool that the pages belong to.
        half_life_s: Time in seconds after which a use counts half.
        page_worth: Values a block.
    """

    def __init__(self, pool: PagePool, *, half_life_s: float, page_worth: PageWorth) -> None:
        self._pool = pool
        self._half_life_s = half_life_s
        self._page_worth = page_worth
        self._worth = np.full(pool.num_pages, -math.inf)  # in octaves, without `_DEPTH_STEP`
        self._depths = np.zeros(pool.num_pages, dtype=np.int32)
        self._candidates = NO_PAGES  # pages cached at the last sort, least worth first
        self._candidate_worth: list[float] = []  # with `_DEPTH_STEP`
        self._next = 0  # candidate at which the search for the first starts
        self._num_gone = 0  # leading candidates that were evicted
        self._num_revived = 0  # the pool's count at the last sort
        self._is_sorted = True  # False once a candidate's worth rose without its being revived
        self._sure_up_to = math.inf  # no page cached since the last sort is worth less

    def begin(self, pages: Pages, depths: list[int]) -> None:
        """Add newly published pages; ``depths`` are the positions of their blocks in their sequences."""
        self._worth[pages] = -math.inf
        self._depths[pages] = depths

    def count(self, pages: Pages, now_s: float) -> None:
        """Count one use of each page, by a sequence that is about to release them."""
        if self._pool.is_cached(pages).any():  # the sequence computed the same blocks again, in other pages
            self._is_sorted = False
        moment = now_s / self._half_life_s
        self._worth[pages] = self._page_worth.of_blocks(self._worth[pages], moment)
        self._sure_up_to = min(self._sure_up_to, moment - _DEPTH_STEP * _MAX_DEPTH)

    def worth_of(self, pages: Pages) -> NDArray[np.float64]:
        """Return what pages are worth, in octaves."""
        worth: NDArray[np.float64] = self._worth[pages] - _DEPTH_STEP * self._depths[pages]
        return worth

    def first(self, most: int, up_to: float) -> Pages:
        """Return the cached pages to evict first, of those worth at most ``up_to``; the next call may find more.

        Args:
            most: Most pages to return; at least one is returned if any may be evicted.
            up_to: Worth, in octaves.
        """
        pages, worth = self._first(most)
        return pages[: bisect_right(worth, up_to)]

    def evict(self, pages: Pages) -> None:
        """Have the pool take back pages that `first` has just returned."""
        self._num_gone = self._next + len(pages)
        self._pool.evict(pages)

    @property
    def _is_intact(self) -> bool:
        """True if all candidates except the evicted ones are still cached, with the worth of the last sort."""
        return self._is_sorted and self._pool.num_revived == self._num_revived

    def _first(self, most: int) -> tuple[Pages, list[float]]:
        """Return the pages to evict first and their worth, at most ``most`` and at least one if any is cached.

        Candidates, by rising worth:

            [0, _num_gone)                    evicted since the last sort
            [_next, len(_candidates))         may be first, if worth less than ``_sure_up_to``
        """
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
                    self._next = begin + int(still[0])  # the candidates before it are gone or are worth more now
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
