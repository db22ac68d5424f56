"""One market for the pool's pages: the cold prefixes and cold adapters that cost least to bring back are evicted first.

The worth of a page is the expected cost, per second and page, of not having it: how often it was asked for lately
(`arrival_rates`, one half-life for both kinds), times the measured seconds it takes to bring back. Those are the
seconds to recompute a block (`StepCosts.prefill_s_per_token`) or to copy a page of an adapter
(`CopyCosts.copy_s_per_page`, plus the page's share of a fetch from the store if the arena lost the image). All values
are octaves (log2): in octaves, decay needs no upkeep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from loraplex_engine.adapters.adapter import Adapter, Room

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.pages.prefix_cache import PrefixCache
    from loraplex_engine.scheduler.step_costs import StepCosts


class PageSource(Protocol):
    """A source of pages for one purpose: `PageEviction`, or one side of a pool that is cut in two."""

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        ...

    @property
    def num_obtainable(self) -> int:
        """Pages free now or soon, or freed by evicting what no request claims."""
        ...

    def num_obtainable_but(self, spared: set[str]) -> int:
        """Return the pages free now or soon, or freed by evicting everything except the ``spared`` adapters."""
        ...

    def make_room(self, num_pages: int, may_evict: Callable[[Adapter], bool], *, up_to: float = math.inf) -> Room:
        """Free pages by evicting those worth least, none worth more than ``up_to`` octaves."""
        ...


class PageEviction:
    """Makes room in the pool.

    Args:
        pool: The pages.
        cache: Adapters; idle ones can be evicted.
        prefix: Blocks; cached ones can be evicted.
        costs: Measured costs of steps.
        block_tokens: Tokens of a block.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        cache: AdapterCache,
        prefix: PrefixCache,
        costs: StepCosts,
        block_tokens: int,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._prefix = prefix
        self._costs = costs
        self._block_tokens = block_tokens
        self._page_worth = cache.ranking.page_worth

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return self._pool.num_free

    @property
    def num_obtainable(self) -> int:
        """Pages free now or soon, or freed by evicting blocks and adapters that no request claims."""
        return self._num_without_adapters + self._cache.ranking.num_unclaimed_idle_pages

    def num_obtainable_but(self, spared: set[str]) -> int:
        """Return the pages free now or soon, or freed by evicting blocks and all adapters except ``spared``."""
        kept = sum(self._cache.ranking.num_idle_pages_of(digest) for digest in spared)
        return self._num_without_adapters + self._cache.ranking.num_idle_pages - kept

    @property
    def _num_without_adapters(self) -> int:
        return self._pool.num_free + self._pool.num_retiring + self._pool.num_cached

    def make_room(self, num_pages: int, may_evict: Callable[[Adapter], bool], *, up_to: float = math.inf) -> Room:
        """Free ``num_pages`` by evicting the pages worth least; if that is impossible, nothing is evicted.

        Args:
            num_pages: Pages wanted.
            may_evict: Tells which idle adapters may be evicted.
            up_to: Worth, in octaves, above which nothing may be evicted.
        """
        missing = num_pages - self._pool.num_free - self._pool.num_retiring
        if missing > 0 and not self._evict(missing, may_evict, up_to):
            return Room.NO
        if num_pages > self._pool.num_free:  # evict more blocks, do not wait for steps
            self._prefix.evict(num_pages - self._pool.num_free, up_to - self.block_cost)
        return Room.NOW if num_pages <= self._pool.num_free else Room.SOON

    def _evict(self, missing: int, may_evict: Callable[[Adapter], bool], up_to: float) -> bool:
        """Evict ``missing`` pages, by rising worth of blocks and adapters together; False, evicting none, if it cannot.

        With the adapters that may be evicted in order of worth, a_0 <= a_1 <= ..., the loop evicts until it has enough:

            (-inf, a_0]       cached blocks worth at most as much as the first adapter, then that adapter
            (a_i, a_i+1]      cached blocks worth at most as much as the next adapter, then that adapter
            (a_last, up_to]   cached blocks; no adapter is left
        """
        if missing > self._pool.num_cached + self._cache.ranking.num_idle_pages:
            return False
        rest = self._num_beyond_blocks(missing, up_to)
        if rest > 0 and not self._has_idle(up_to):
            return False
        with self._cache.ranking.idle_in_order() as idle:
            adapters = filter(may_evict, takewhile(lambda adapter: adapter.worth <= up_to, idle))  # by rising worth
            chosen = _enough(rest, adapters)
            if chosen is None:
                return False
            while missing > 0:
                adapter = chosen.pop(0) if chosen else next(adapters, None)
                bound = up_to if adapter is None else min(up_to, adapter.worth)
                missing -= self._prefix.evict(missing, bound - self.block_cost)
                if missing > 0:
                    if adapter is None:
                        raise RuntimeError(f"{missing} pages that were to be evicted are not there")
                    self._cache.evict(adapter)
                    missing -= adapter.num_pages
        return True

    def _num_beyond_blocks(self, missing: int, up_to: float) -> int:
        """Return how many of ``missing`` pages have to come from adapters; cached blocks have the others."""
        if up_to == math.inf:
            return missing - self._pool.num_cached
        return missing - self._prefix.num_worth(up_to - self.block_cost, missing)

    def _has_idle(self, up_to: float) -> bool:
        """Tell whether any idle adapter is worth at most ``up_to``."""
        first = self._cache.ranking.least_idle
        return first is not None and first.worth <= up_to

    @property
    def block_cost(self) -> float:
        """What the seconds to recompute a block add to a block's worth, in octaves."""
        return self._page_worth.block_cost(self._block_tokens * self._costs.prefill_s_per_token)


PageSources = Callable[["PagePool", "AdapterCache", "PrefixCache", "StepCosts", int], tuple[PageSource, PageSource]]
"""Makes the sources for KV and for adapters from pool, cache, prefix cache, measured costs and tokens of a block."""


def one_market(
    pool: PagePool, cache: AdapterCache, prefix: PrefixCache, costs: StepCosts, block_tokens: int
) -> tuple[PageSource, PageSource]:
    """Return one source for both kinds of page, as `PageSources` says."""
    source = PageEviction(pool=pool, cache=cache, prefix=prefix, costs=costs, block_tokens=block_tokens)
    return source, source


def _enough(num_pages: int, adapters: Iterator[Adapter]) -> list[Adapter] | None:
    """Return the first adapters that together have so many pages; None if all of them together have fewer."""
    chosen: list[Adapter] = []
    while num_pages > 0:
        adapter = next(adapters, None)
        if adapter is None:
            return None
        chosen.append(adapter)
        num_pages -= adapter.num_pages
    return chosen
