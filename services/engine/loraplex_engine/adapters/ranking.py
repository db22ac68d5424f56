"""What adapters are worth, and which is evicted or warmed first."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from loraplex_engine.adapters.arrival_rates import ArrivalRates
from loraplex_engine.adapters.copy_costs import CopyCosts
from loraplex_engine.adapters.eviction_order import EvictionOrder
from loraplex_engine.adapters.warm_order import WarmOrder
from loraplex_engine.messages import ResidencyState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from loraplex_engine.adapters.adapter import Adapter
    from loraplex_engine.pages.page_worth import PageWorth


class AdapterRanking:
    """Orders of the adapters that may leave the pool, that may leave the arena, and that may be warmed.

    Args:
        page_worth: Values an adapter.
        half_life_s: Time in seconds after which an arrival counts half in an adapter's worth.

    Attributes:
        rates: How often each adapter was asked for lately, including adapters that this engine does not hold.
        costs: What fetching and copying adapters takes, measured.
    """

    def __init__(self, *, page_worth: PageWorth, half_life_s: float) -> None:
        self._page_worth = page_worth
        self._idle = EvictionOrder(lambda adapter: adapter.is_idle)
        self._images = EvictionOrder(_has_idle_image)
        self._warmable = WarmOrder()
        self.rates = ArrivalRates(half_life_s=half_life_s)
        self.costs = CopyCosts()

    @property
    def page_worth(self) -> PageWorth:
        """Values adapters, and cached blocks beside them."""
        return self._page_worth

    def place(self, adapter: Adapter) -> None:
        """Set an adapter's present worth, and put the adapter at its place in the orders."""
        cost_s = self.costs.return_s_per_page(adapter.num_pages, is_in_arena=bool(adapter.arena_slots))
        adapter.worth = self._page_worth.of_adapter(
            octaves=self.rates.octaves(adapter.digest), cost_s=cost_s, used=adapter.last_used_s / self.rates.half_life_s
        )
        self._idle.place(adapter)
        self._images.place(adapter)
        self._warmable.place(adapter)

    # --- idle adapters: those that may leave the pool ---

    @property
    def num_idle_pages(self) -> int:
        """Pages that eviction could free."""
        return self._idle.num_pages

    @property
    def num_unclaimed_idle_pages(self) -> int:
        """Pages that eviction could free without taking an adapter that a waiting request claims."""
        return self._idle.num_pages - self._idle.num_claimed_pages

    def num_idle_pages_of(self, digest: str) -> int:
        """Return an adapter's pages if it is idle, else 0."""
        return self._idle.num_pages_of(digest)

    @property
    def least_idle(self) -> Adapter | None:
        """The idle adapter that is worth least; None if none is idle."""
        return self._idle.first

    def idle_in_order(self) -> AbstractContextManager[Iterator[Adapter]]:
        """Return an iterator over idle adapters, those worth least first; they may be evicted while it runs."""
        return self._idle.in_order()

    def choose_idle(self, num_pages: int, may_evict: Callable[[Adapter], bool]) -> list[Adapter] | None:
        """Return the idle adapters worth least that together free ``num_pages``; None if all of them are too few."""
        return self._idle.choose(num_pages, may_evict)

    def choose_idle_adapters(self, count: int, may_evict: Callable[[Adapter], bool]) -> list[Adapter] | None:
        """Return the ``count`` idle adapters worth least; None if there are fewer."""
        if count <= 0:
            return []
        with self._idle.in_order() as idle:
            chosen = list(islice(filter(may_evict, idle), count))
        return chosen if len(chosen) == count else None

    # --- images that may leave the arena, and adapters worth loading ahead ---

    def images_in_order(self) -> AbstractContextManager[Iterator[Adapter]]:
        """Return an iterator over adapters whose copy in the arena may be freed, least worth first."""
        return self._images.in_order()

    @property
    def most_warmable(self) -> Adapter | None:
        """The adapter in the arena that is worth most on the device; None if no request ever asked for one."""
        return self._warmable.best

    @property
    def warmable_version(self) -> int:
        """Rises whenever `most_warmable` may have changed."""
        return self._warmable.version

    def check_integrity(self, adapters: list[Adapter]) -> None:
        """Recount the adapters in the orders.

        Raises:
            RuntimeError: If an order lacks an adapter or has one too many.
        """
        self._idle.check_integrity(adapters)
        self._images.check_integrity(adapters)


def _has_idle_image(adapter: Adapter) -> bool:
    """Tell whether the arena's copy may be freed: it is neither arriving nor being read."""
    return bool(adapter.arena_slots) and adapter.state not in (ResidencyState.WANTED, ResidencyState.LOADING)
