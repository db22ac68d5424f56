"""A pool cut in two for good, a share for KV and the rest for adapters: what other systems do.

Two views with the interface of `PageEviction`, one for whoever needs pages of KV and one for whoever loads adapters. Neither
side takes from the other; inside a side, what is worth least gives way. Here so that benchmarks compare fixed shares with
the one market inside the same engine.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraplex_engine.adapters.adapter import Adapter, Room

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.pages.prefix_cache import PrefixCache


class KvShare:
    """Pages of sequences and cached blocks, at most ``num_pages`` together."""

    def __init__(self, *, num_pages: int, pool: PagePool, prefix: PrefixCache) -> None:
        self._num_pages = num_pages
        self._pool = pool
        self._prefix = prefix

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return max(0, min(self._pool.num_free, self._num_pages - self._pool.num_kv - self._pool.num_cached))

    @property
    def num_obtainable(self) -> int:
        """Pages free now or soon, or to be had by evicting cached blocks."""
        return max(0, self._num_pages - self._pool.num_kv)

    def num_quiet(self, most: int) -> int:
        """Return `num_obtainable`, up to ``most``: no adapter ever has to go."""
        return min(most, self.num_obtainable)

    def num_obtainable_but(self, spared: set[str]) -> int:
        """Return `num_obtainable`: adapters have nothing to give."""
        del spared
        return self.num_obtainable

    def make_room(self, num_pages: int, may_evict: Callable[[Adapter], bool], *, up_to: float = math.inf) -> Room:
        """Free pages by evicting cached blocks, those worth least first."""
        del may_evict, up_to
        if num_pages > self.num_obtainable:
            return Room.NO
        missing = num_pages - self.num_free
        if missing > 0:
            self._prefix.evict(missing, math.inf)
        return Room.NOW if num_pages <= self.num_free else Room.SOON


class AdapterShare:
    """Pages of adapters, at most ``num_pages``."""

    def __init__(self, *, num_pages: int, pool: PagePool, cache: AdapterCache) -> None:
        self._num_pages = num_pages
        self._pool = pool
        self._cache = cache

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return max(0, min(self._pool.num_free, self._num_pages - self._pool.num_adapter))

    @property
    def num_obtainable(self) -> int:
        """All pages of the pool: a load here never takes what growing sequences need."""
        return self._pool.num_pages

    def num_quiet(self, most: int) -> int:
        """Return the pages that can be allocated now, up to ``most``."""
        return min(most, self.num_free)

    def num_obtainable_but(self, spared: set[str]) -> int:
        """Return `num_obtainable`."""
        del spared
        return self.num_obtainable

    def make_room(self, num_pages: int, may_evict: Callable[[Adapter], bool], *, up_to: float = math.inf) -> Room:
        """Free pages by evicting idle adapters, those worth least first; none is evicted in vain."""
        missing = self._pool.num_adapter + num_pages - self._num_pages
        with self._cache.ranking.idle_in_order() as idle:
            chosen: list[Adapter] = []
            for adapter in idle:
                if missing <= 0 or adapter.worth > up_to:  # by rising worth
                    break
                if may_evict(adapter):
                    chosen.append(adapter)
                    missing -= adapter.num_pages
            if missing > 0:
                return Room.NO
            for adapter in chosen:
                self._cache.evict(adapter)
        return Room.NOW if num_pages <= self.num_free else Room.SOON
