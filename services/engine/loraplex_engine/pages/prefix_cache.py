"""Blocks of keys and values under their names, so that sequences with equal beginnings share pages.

Accounting only; nothing is copied. A block is *published* once its tokens are known and computed, by the first sequence
that computed it. A sequence that holds a page keeps it from eviction; when the last one leaves, the page stays as long
as its room is not worth more for something else (`scheduler.eviction`, `cold_blocks`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.pages.cold_blocks import ColdBlocks
from loraplex_engine.pages.page_pool import NO_PAGES
from loraplex_engine.pages.page_worth import EXPECTED_COST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.pages.page_pool import PagePool, Pages
    from loraplex_engine.pages.page_worth import PageWorth


class PrefixCache:
    """Knows which page holds which block, and in what order cached pages are evicted.

    Args:
        pool: The pool whose pages hold the blocks.
        half_life_s: Time in seconds after which a use counts half.
        page_worth: Values a block.

    Attributes:
        num_evicted: Blocks evicted so far.
    """

    def __init__(self, pool: PagePool, *, half_life_s: float, page_worth: PageWorth = EXPECTED_COST) -> None:
        self._pool = pool
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._cold = ColdBlocks(pool, half_life_s=half_life_s, page_worth=page_worth)
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._pages)

    def match(self, keys: Sequence[bytes], most: int) -> Pages:
        """Return the pages of the longest cached beginning of ``keys``, at most ``most`` blocks."""
        found: list[int] = []
        pages = self._pages
        for key in keys[:most]:
            page = pages.get(key)
            if page is None:
                break
            found.append(page)
        return np.array(found, dtype=np.intp) if found else NO_PAGES

    def publish(self, keys: Sequence[bytes], pages: Pages) -> None:
        """Name a sequence's first blocks; a block that another page already holds keeps that page.

        Args:
            keys: Names of the sequence's blocks, from its first on.
            pages: ``[len(keys)]``; the sequence's pages.
        """
        depths = [depth for depth, key in enumerate(keys) if key not in self._pages]
        if depths:
            published = pages[depths]
            new_keys, new_pages = [keys[depth] for depth in depths], published.tolist()
            self._pages.update(zip(new_keys, new_pages, strict=True))
            self._keys.update(zip(new_pages, new_keys, strict=True))
            self._cold.begin(published, depths)
            self._pool.publish(published)

    def leave(self, keys: Sequence[bytes], now_s: float) -> None:
        """Count one use of each block of a sequence that is about to release its pages."""
        known = [self._pages[key] for key in keys if key in self._pages]
        if known:
            self._cold.count(np.array(known, dtype=np.intp), now_s)

    # --- eviction ---

    @property
    def least_worth(self) -> float:
        """Worth of the cached page that is evicted first, in octaves; infinity if none is cached."""
        return min(self._cold.worth_of(self._cold.first(1, math.inf)).tolist(), default=math.inf)

    def num_worth(self, up_to: float, most: int) -> int:
        """Return how many cached pages worth at most ``up_to`` octaves `evict` would find at once, at most ``most``."""
        return len(self._cold.first(most, up_to))

    def evict(self, most: int, up_to: float) -> int:
        """Evict up to ``most`` cached pages worth at most ``up_to``, those worth least first; returns how many."""
        num_evicted = 0
        while num_evicted < most and len(pages := self._cold.first(most - num_evicted, up_to)):
            for page in pages.tolist():
                del self._pages[self._keys.pop(page)]
            self._cold.evict(pages)
            num_evicted += len(pages)
        self.num_evicted += num_evicted
        return num_evicted

    def check_integrity(self) -> None:
        """Compare the names with the pool's published pages.

        Raises:
            RuntimeError: If a published page has no name, a name has no page, or a page has two.
        """
        named = np.array(sorted(self._keys), dtype=np.intp)
        if len(self._keys) != len(self._pages) or any(self._pages[key] != page for page, key in self._keys.items()):
            raise RuntimeError(f"{len(self._pages)} blocks have names, {len(self._keys)} pages do")
        if not np.array_equal(named, self._pool.published_pages):
            raise RuntimeError(f"{len(named)} pages have names, {len(self._pool.published_pages)} are published")
