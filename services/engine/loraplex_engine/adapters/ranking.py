"""What is known of all adapters on one engine: states, worth, claims, and the orders in which they give way.

`AdapterCache` adds how they come and go.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraplex_engine.adapters.adapter import Adapter, AdapterStatus
from loraplex_engine.adapters.arrival_rates import ArrivalRates
from loraplex_engine.adapters.copy_costs import CopyCosts
from loraplex_engine.adapters.eviction_order import EvictionOrder
from loraplex_engine.adapters.warm_order import WarmCounts, WarmOrder, WarmResult
from loraplex_engine.messages import ResidencyChanged, ResidencyState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from loraplex_engine.messages import StoreEvent
    from loraplex_engine.pages.page_pool import PagePool
    from loraplex_engine.pages.page_worth import PageWorth


class AdapterRegister:
    """All adapters that this engine holds or waits for.

    Attributes:
        rates: How often each adapter was asked for lately, known here or not.
        costs: What fetching and copying adapters takes, measured.
        warm: What became of adapters that were loaded before anybody asked.
        sequence: Of the latest `ResidencyChanged`.
        num_resident: Adapters that can be leased.
        num_loading: Adapters being copied to the device.
        num_leases: Of all adapters together.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        emit: Callable[[StoreEvent], None],
        clock: Callable[[], float],
        half_life_s: float,
        page_worth: PageWorth,
    ) -> None:
        self._pool = pool
        self._emit = emit
        self._clock = clock
        self._page_worth = page_worth
        self._adapters: dict[str, Adapter] = {}
        self._idle = EvictionOrder(lambda adapter: adapter.is_idle)
        self._images = EvictionOrder(_has_idle_image)
        self._warmable = WarmOrder()
        self._pinned: set[str] = set()
        self._claims: dict[str, int] = {}
        self._changed: set[str] = set()
        self.rates = ArrivalRates(half_life_s=half_life_s)
        self.costs = CopyCosts()
        self.warm = WarmCounts()
        self.sequence = 0
        self.num_resident = 0
        self.num_loading = 0
        self.num_leases = 0

    # --- questions ---

    def state_of(self, digest: str) -> ResidencyState:
        """Return where an adapter stands; ABSENT if it was never heard of."""
        adapter = self._adapters.get(digest)
        return adapter.state if adapter else ResidencyState.ABSENT

    def due_s(self, digest: str) -> float:
        """Return when a WANTED adapter's image has its turn for room in the arena; -inf if it was never heard of."""
        adapter = self._adapters.get(digest)
        return adapter.due_s if adapter else -math.inf

    def num_pages_of(self, digest: str) -> int | None:
        """Return the pages an adapter takes, or None as long as its image was not seen."""
        adapter = self._adapters.get(digest)
        return adapter.num_pages if adapter and adapter.spec else None

    @property
    def num_pinned(self) -> int:
        """Pinned adapters."""
        return len(self._pinned)

    @property
    def num_pinned_pages(self) -> int:
        """Pages of pinned adapters, on the device or on their way."""
        return sum(self._adapters[digest].num_pages for digest in self._pinned)

    @property
    def num_idle_pages(self) -> int:
        """Pages that eviction could free."""
        return self._idle.num_pages

    @property
    def num_unclaimed_idle_pages(self) -> int:
        """Pages that eviction could free without taking an adapter from a waiting request that is next."""
        return self._idle.num_pages - self._idle.num_claimed_pages

    @property
    def num_held_pages(self) -> int:
        """Pages on the device that eviction could not free now: leased, pinned, loading or draining adapters."""
        return self._pool.num_adapter - self._idle.num_pages

    def num_idle_pages_of(self, digest: str) -> int:
        """Return an adapter's pages if it is idle, else 0."""
        return self._adapters[digest].num_pages if digest in self._idle else 0

    def is_pinned(self, digest: str) -> bool:
        """Tell whether an adapter is pinned."""
        adapter = self._adapters.get(digest)
        return adapter is not None and adapter.is_pinned

    def status(self, digest: str) -> AdapterStatus:
        """Describe an adapter, known or not."""
        adapter = self._adapters.get(digest) or Adapter(digest)
        return AdapterStatus(
            digest=digest,
            state=adapter.state,
            is_in_arena=bool(adapter.arena_slots),
            num_pages=adapter.num_pages,
            is_pinned=adapter.is_pinned,
            num_leases=adapter.num_leases,
            generation=adapter.generation,
            idle_s=max(0.0, self._clock() - adapter.last_used_s) if adapter.num_leases == 0 else 0.0,
            max_rank=adapter.max_rank,
            sequence=self.sequence,
        )

    def statuses(self) -> list[AdapterStatus]:
        """Describe all adapters, by digest."""
        return [self.status(digest) for digest in sorted(self._adapters)]

    # --- demand ---

    def count_arrival(self, digest: str, weight: float = 1.0) -> None:
        """Note that a request asks for an adapter, or something foretells one; its worth rises."""
        self.rates.count(digest, self._clock(), weight)
        adapter = self._adapters.get(digest)
        if adapter is not None:
            adapter.may_warm = True
            self._place(adapter)

    def claim(self, digest: str) -> None:
        """Keep an adapter for a waiting request that is next."""
        self._set_claims(digest, self.num_claims_of(digest) + 1)

    def unclaim(self, digest: str) -> None:
        """Take a claim back; the adapter may be gone.

        Raises:
            RuntimeError: If there is no claim.
        """
        if not self.num_claims_of(digest):
            raise RuntimeError(f"adapter {digest} has no claim to take back")
        self._set_claims(digest, self.num_claims_of(digest) - 1)

    def _set_claims(self, digest: str, num_claims: int) -> None:
        if num_claims:
            self._claims[digest] = num_claims
        else:
            del self._claims[digest]
        adapter = self._adapters.get(digest)
        if adapter is not None:
            adapter.num_claims = num_claims
            self._place(adapter)

    def num_claims_of(self, digest: str) -> int:
        """Return how many waiting requests an adapter is kept or brought for."""
        return self._claims.get(digest, 0)

    @property
    def num_claimed(self) -> int:
        """Adapters that waiting requests claim."""
        return len(self._claims)

    @property
    def num_claims(self) -> int:
        """Claims on all adapters together."""
        return sum(self._claims.values())

    @property
    def most_warmable(self) -> Adapter | None:
        """The adapter in the arena that is worth most on the device; None if none was ever asked for."""
        return self._warmable.best

    @property
    def warmable_version(self) -> int:
        """Rises whenever `most_warmable` may have changed."""
        return self._warmable.version

    @property
    def least_idle(self) -> Adapter | None:
        """The idle adapter that is worth least; None if none is idle."""
        return self._idle.first

    def idle_in_order(self) -> AbstractContextManager[Iterator[Adapter]]:
        """Give an iterator over idle adapters, least worth first; they may be evicted while it runs."""
        return self._idle.in_order()

    # --- pins ---

    def set_pinned(self, digest: str, is_pinned: bool) -> None:
        """Keep an adapter the engine holds in the pool whatever the pressure, or no longer."""
        adapter = self._adapters[digest]
        if adapter.is_pinned != is_pinned:
            self._pin(adapter, is_pinned)
            self._report(adapter)

    def _pin(self, adapter: Adapter, is_pinned: bool) -> None:
        adapter.is_pinned = is_pinned
        (self._pinned.add if is_pinned else self._pinned.discard)(adapter.digest)
        self._place(adapter)

    @property
    def pins_to_load(self) -> list[str]:
        """Pinned adapters that are only in the arena."""
        return [d for d in sorted(self._pinned) if self._adapters[d].state is ResidencyState.IN_ARENA]

    def take_changed(self) -> set[str]:
        """Return and forget the adapters that moved."""
        changed, self._changed = self._changed, set()
        return changed

    # --- for AdapterCache ---

    def _place(self, adapter: Adapter) -> None:
        """Say what an adapter is worth and put it where it belongs in the orders."""
        cost_s = self.costs.return_s_per_page(adapter.num_pages, is_in_arena=bool(adapter.arena_slots))
        adapter.worth = self._page_worth.of_adapter(
            octaves=self.rates.octaves(adapter.digest), cost_s=cost_s, used=adapter.last_used_s / self.rates.half_life_s
        )
        self._idle.place(adapter)
        self._images.place(adapter)
        self._warmable.place(adapter)

    def _known(self, digest: str) -> Adapter:
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = self._adapters[digest] = Adapter(digest, num_claims=self.num_claims_of(digest))
        return adapter

    def _move(self, adapter: Adapter, state: ResidencyState) -> None:
        self.num_resident += (state is ResidencyState.RESIDENT) - (adapter.state is ResidencyState.RESIDENT)
        self.num_loading += (state is ResidencyState.LOADING) - (adapter.state is ResidencyState.LOADING)
        adapter.move_to(state)
        self._place(adapter)
        self._changed.add(adapter.digest)
        self._report(adapter)
        if state is ResidencyState.ABSENT:
            del self._adapters[adapter.digest]

    def _report(self, adapter: Adapter) -> None:
        self.sequence += 1
        self._emit(
            ResidencyChanged(
                sequence=self.sequence,
                digest=adapter.digest,
                state=adapter.state,
                generation=adapter.generation,
                num_leases=adapter.num_leases,
                num_pages=adapter.num_pages,
                is_pinned=adapter.is_pinned,
                max_rank=adapter.max_rank,
            )
        )

    def _count_warm(self, adapter: Adapter, result: WarmResult) -> None:
        """Settle what became of an adapter that was loaded before anybody asked; once."""
        if adapter.is_warmed:
            adapter.is_warmed = False
            self.warm.count(result, adapter.num_pages)

    def check_integrity(self) -> None:
        """Recount what may give way.

        Raises:
            RuntimeError: If an order lacks an adapter or has one too many.
        """
        adapters = list(self._adapters.values())
        self._idle.check_integrity(adapters)
        self._images.check_integrity(adapters)
        claims = {adapter.digest: adapter.num_claims for adapter in adapters if adapter.num_claims}
        if any(self._claims.get(digest) != count for digest, count in claims.items()):
            raise RuntimeError(f"adapters have claims {claims}, accounted are {self._claims}")


def _has_idle_image(adapter: Adapter) -> bool:
    """Tell whether the arena's copy may be given up: it is neither on its way in nor being read."""
    return bool(adapter.arena_slots) and adapter.state not in (ResidencyState.WANTED, ResidencyState.LOADING)
