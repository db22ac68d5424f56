"""Other systems' memory policies, to compare with the engine's own inside the same engine.

A pool cut in two for good, a share for KV and the rest for adapters: two `PageSource`s, neither of which takes from the
other; inside a side, what is worth least gives way. And the least-recently-used rule of what a page is worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_engine.adapters.adapter import Adapter, Room

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.pages.prefix_cache import PrefixCache
    from loraplex_engine.scheduler.eviction import PageSource
    from loraplex_engine.scheduler.step_costs import StepCosts
    from numpy.typing import NDArray


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


@dataclass(frozen=True, slots=True)
class FixedShares:
    """Cuts a pool: this share of its pages for KV, the rest for adapters; `PageSources` of a scheduler.

    Raises:
        ValueError: If the share is not in 0..1.
    """

    kv_share: float

    def __post_init__(self) -> None:
        if not 0 < self.kv_share <= 1:
            raise ValueError(f"kv_share {self.kv_share} is not in 0..1")

    def __call__(
        self, pool: PagePool, cache: AdapterCache, prefix: PrefixCache, costs: StepCosts, block_tokens: int
    ) -> tuple[PageSource, PageSource]:
        """Return the sources for KV and for adapters."""
        del costs, block_tokens
        num_kv = round(pool.num_pages * self.kv_share)
        for_adapters = AdapterShare(num_pages=pool.num_pages - num_kv, pool=pool, cache=cache)
        return KvShare(num_pages=num_kv, pool=pool, prefix=prefix), for_adapters


class Recency:
    """The moment of the last use, whatever it costs to bring back."""

    def of_adapter(self, *, octaves: float, cost_s: float, used: float) -> float:
        """Return the moment of the last use."""
        del octaves, cost_s
        return used

    def of_blocks(self, worth: NDArray[np.float64], moment: float) -> NDArray[np.float64]:
        """Return the moment."""
        return np.full_like(worth, moment)

    def block_cost(self, cost_s: float) -> float:
        """Return nothing."""
        del cost_s
        return 0.0


RECENCY: Final = Recency()
