"""Blocks of keys and values under their names, so that sequences with equal beginnings share pages.

Accounting only; copies nothing. A block is *published* once its tokens are known and computed, by whoever computed it
first. Sequences that hold a page keep it from eviction; when the last one leaves, the page stays as long as its room is
not worth more to others (`economy`).

What a block is worth is the decayed number of sequences that have left it behind. It is kept as
``log2(sum of 2 ** (t / half_life))`` over those moments: two blocks compare the same way at any later time, so nothing
has to be updated as time passes. Who leaves a block leaves all blocks before it at the same moment, so a block is never
worth more than its predecessor, and of equals the later one goes first: no prefix loses its beginning before its end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_engine.appraisal import EXPECTED_COST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loraplex_engine.appraisal import Appraisal
    from loraplex_engine.page_pool import PagePool

_DEPTH_STEP: Final = 1e-9
"""What a block's position takes off its worth, in octaves: orders equals, and far above a float's resolution."""
_MAX_DEPTH: Final = 1 << 20
_MIN_CANDIDATES: Final = 512
_MIN_LOOKED_AT: Final = 64
_NO_PAGES: Final = np.empty(0, dtype=np.int32)


class PrefixCache:
    """Which page holds which block, and in what order cached pages give way.

    Args:
        pool: Whose pages hold the blocks.
        half_life_s: After which a use counts half.
        appraisal: What a block is worth.

    Attributes:
        num_evicted: Blocks that gave way so far.
    """

    def __init__(self, pool: PagePool, *, half_life_s: float, appraisal: Appraisal = EXPECTED_COST) -> None:
        self._pool = pool
        self._half_life_s = half_life_s
        self._appraisal = appraisal
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._worth = np.full(pool.num_pages, -math.inf)  # in octaves, without `_DEPTH_STEP`
        self._depths = np.zeros(pool.num_pages, dtype=np.int32)
        self._candidates: NDArray[np.int32] = _NO_PAGES  # cached pages when they were sorted, least worth first
        self._next_candidate = 0
        self._sure_up_to = math.inf  # no page cached since then is worth less
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._pages)

    def match(self, keys: Sequence[bytes], most: int) -> NDArray[np.int32]:
        """Return the pages of the longest cached beginning, at most ``most`` blocks; int32 ``[num_blocks]``."""
        found: list[int] = []
        pages = self._pages
        for key in keys[:most]:
            page = pages.get(key)
            if page is None:
                break
            found.append(page)
        return np.array(found, dtype=np.int32) if found else _NO_PAGES

    def publish(self, keys: Sequence[bytes], pages: NDArray[np.int32]) -> None:
        """Name a sequence's first blocks; a block that another page holds already keeps its page.

        Args:
            keys: Names, by block from the sequence's first.
            pages: int32 ``[len(keys)]``; the sequence's pages.
        """
        new: list[int] = []
        for depth, (key, page) in enumerate(zip(keys, pages.tolist(), strict=True)):
            if key not in self._pages:
                self._pages[key] = page
                self._keys[page] = key
                self._depths[page] = depth
                new.append(page)
        if new:
            published = np.array(new, dtype=np.int32)
            self._worth[published] = -math.inf
            self._pool.publish(published)

    def leave(self, keys: Sequence[bytes], now_s: float) -> None:
        """Count one use of each block of a sequence that is about to release its pages."""
        known = [self._pages[key] for key in keys if key in self._pages]
        if known:
            pages = np.array(known, dtype=np.int32)
            moment = now_s / self._half_life_s
            self._worth[pages] = self._appraisal.of_blocks(self._worth[pages], moment)
            self._sure_up_to = min(self._sure_up_to, moment - _DEPTH_STEP * _MAX_DEPTH)

    # --- eviction ---

    @property
    def least_worth(self) -> float:
        """Worth of the cached page that goes first, in octaves; infinity if none is cached."""
        first = self._first_candidates(1)
        return self._effective(first)[0] if len(first) else math.inf

    def num_worth(self, up_to: float, most: int) -> int:
        """Return how many cached pages worth at most ``up_to`` octaves are at hand, up to ``most``."""
        return int(np.count_nonzero(self._effective(self._first_candidates(most)) <= up_to))

    def evict(self, most: int, up_to: float) -> int:
        """Give up to ``most`` cached pages back whose worth is at most ``up_to``, least first; returns how many."""
        num_evicted = 0
        while num_evicted < most:
            pages = self._first_candidates(most - num_evicted)
            pages = pages[self._effective(pages) <= up_to]
            if not len(pages):
                break
            self._forget(pages)
            self._pool.evict(pages)
            num_evicted += len(pages)
        self.num_evicted += num_evicted
        return num_evicted

    def _forget(self, pages: NDArray[np.int32]) -> None:
        for page in pages.tolist():
            del self._pages[self._keys.pop(page)]

    def _effective(self, pages: NDArray[np.int32]) -> NDArray[np.float64]:
        worth: NDArray[np.float64] = self._worth[pages] - _DEPTH_STEP * self._depths[pages]
        return worth

    def _first_candidates(self, most: int) -> NDArray[np.int32]:
        """Return cached pages that go before all others, up to ``most`` and at least one if there is any.

        Sorting is put off: pages that were left since the last sort are worth at least one use of that moment, so
        candidates that are worth less still go first.
        """
        while self._next_candidate < len(self._candidates):
            rest = self._candidates[self._next_candidate : self._next_candidate + max(most, _MIN_LOOKED_AT)]
            still = np.flatnonzero(self._pool.is_cached(rest) & (self._effective(rest) < self._sure_up_to))
            if len(still):
                self._next_candidate += int(still[0])  # those before it are gone or have become worth more
                return rest[still[:most]]
            self._next_candidate += len(rest)
        self._sort(max(most, _MIN_CANDIDATES))
        return self._candidates[:most]

    def _sort(self, most: int) -> None:
        cached = self._pool.cached_pages
        worth = self._effective(cached)
        if len(cached) > most:
            lowest = np.argpartition(worth, most - 1)[:most]
            cached, worth = cached[lowest], worth[lowest]
        self._candidates = cached[np.argsort(worth, kind="stable")]
        self._next_candidate = 0
        self._sure_up_to = math.inf

    def check_integrity(self) -> None:
        """Compare the names with the pool's published pages.

        Raises:
            RuntimeError: If a published page has no name, a name has no page, or a page has two.
        """
        named = np.array(sorted(self._keys), dtype=np.int32)
        if len(self._keys) != len(self._pages) or any(self._pages[key] != page for page, key in self._keys.items()):
            raise RuntimeError(f"{len(self._pages)} blocks have names, {len(self._keys)} pages do")
        if not np.array_equal(named, self._pool.published_pages):
            raise RuntimeError(f"{len(named)} pages have names, {len(self._pool.published_pages)} are published")
