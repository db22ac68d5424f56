"""Residency of adapters on one engine: which image is where, who leases it, and what gives way when room is needed.

Accounting only: loads and unloads are handed to the step loop, which has the runner carry them out. Belongs to the
step loop's thread. Three resources are behind it: pages of the pool (shared with KV), indices of the runner's adapter
table, and slots of the host arena (see `arena_grants`).

An adapter without leases and pins is *idle*; idle adapters give way by worth (`economy`), those asked for least and
cheapest to bring back first. The image stays in the arena if it is there. A *claim* is a waiting request's hold on an
adapter that was brought for it: it outranks other waiting requests, not running ones.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from loraplex_engine.adapter_table import EvictionOrder, TableIndices
from loraplex_engine.arrival_rates import DEFAULT_HALF_LIFE_S, ArrivalRates
from loraplex_engine.copy_costs import CopyCosts
from loraplex_engine.messages import ResidencyChanged, ResidencyState, StoreEvent, WantImage
from loraplex_engine.page_pool import PageOwner, PagePool
from loraplex_engine.residency import NEVER, Adapter, AdapterLoad, AdapterStatus, Room

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from loraplex_common.adapter_image import AdapterSpec

    from loraplex_engine.arena import HostArena


class AdapterCache:
    """The state machine of every adapter, and the eviction order over the pool's pages.

    Args:
        pool: Pages, shared with KV.
        arena: Host memory; images that arrived lie in it.
        max_resident: Size of the runner's adapter table.
        emit: Sink of `WantImage` and `ResidencyChanged`.
        clock: Seconds, monotonic.
        half_life_s: After which an arrival counts half in an adapter's worth.

    Attributes:
        rates: How often each adapter was asked for lately, known here or not.
        costs: What bringing adapters takes, measured.
        max_resident: Size of the runner's adapter table.
        sequence: Of the latest `ResidencyChanged`.
        num_resident: Adapters that can be leased.
        num_leases: Of all adapters together.
        load_estimate_s: Moving average of the time from a want to residency.
    """

    def __init__(
        self,
        *,
        pool: PagePool,
        arena: HostArena,
        max_resident: int,
        emit: Callable[[StoreEvent], None],
        clock: Callable[[], float],
        half_life_s: float = DEFAULT_HALF_LIFE_S,
    ) -> None:
        self._pool = pool
        self._arena = arena
        self._emit = emit
        self._clock = clock
        self._adapters: dict[str, Adapter] = {}
        self._idle = EvictionOrder(lambda adapter: adapter.is_idle)
        self._images = EvictionOrder(_has_idle_image)
        self.rates = ArrivalRates(half_life_s=half_life_s)
        self.costs = CopyCosts()
        self._pinned: set[str] = set()
        self._indices = TableIndices(max_resident)
        self.max_resident = max_resident
        self._loads: list[AdapterLoad] = []
        self._changed: set[str] = set()
        self._claims: dict[str, int] = {}
        self._generations = itertools.count(1)
        self.sequence = 0
        self.num_resident = 0
        self.num_leases = 0
        self.load_estimate_s = 1.0

    # --- questions ---

    def state_of(self, digest: str) -> ResidencyState:
        """Return where an adapter stands; ABSENT if it was never heard of."""
        adapter = self._adapters.get(digest)
        return adapter.state if adapter else ResidencyState.ABSENT

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
            max_rank=adapter.spec.max_rank if adapter.spec else 0,
            sequence=self.sequence,
        )

    def statuses(self) -> list[AdapterStatus]:
        """Describe all adapters, by digest."""
        return [self.status(digest) for digest in sorted(self._adapters)]

    # --- leases ---

    def lease(self, digest: str) -> int:
        """Block an adapter's eviction and return its index in the runner's table.

        Raises:
            RuntimeError: If it is not RESIDENT: the caller asks `state_of` in the same step.
        """
        adapter = self._adapters[digest]
        if adapter.state is not ResidencyState.RESIDENT:
            raise RuntimeError(f"adapter {digest} is {adapter.state}, it cannot be leased")
        adapter.num_leases += 1
        self.num_leases += 1
        adapter.last_used_s = self._clock()
        self._place(adapter)
        if adapter.num_leases == 1:  # not every lease is news, but whether there is one is
            self._report(adapter)
        return adapter.index

    def release(self, digest: str, last_step: int) -> None:
        """Return a lease; ``last_step`` is the last step launched so far.

        Raises:
            RuntimeError: If there is no lease.
        """
        adapter = self._adapters[digest]
        if adapter.num_leases == 0:
            raise RuntimeError(f"adapter {digest} has no lease to return")
        adapter.num_leases -= 1
        self.num_leases -= 1
        adapter.last_used_s = self._clock()
        adapter.last_step = last_step
        if adapter.num_leases == 0 and adapter.state is ResidencyState.DRAINING:
            self._leave_device(adapter)
            return
        self._place(adapter)
        if adapter.num_leases == 0:
            self._report(adapter)

    # --- demand ---

    def count_arrival(self, digest: str) -> None:
        """Note that a request asks for an adapter, or a hint foretells one; its worth rises."""
        self.rates.count(digest, self._clock())
        adapter = self._adapters.get(digest)
        if adapter is not None:
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

    def idle_in_order(self) -> AbstractContextManager[Iterator[Adapter]]:
        """Give an iterator over idle adapters, least worth first; they may be evicted while it runs."""
        return self._idle.in_order()

    def evict(self, adapter: Adapter) -> None:
        """Free an idle adapter's pages."""
        self._leave_device(adapter)

    def _place(self, adapter: Adapter) -> None:
        """Appraise an adapter and put it where it belongs in the orders of eviction."""
        cost_s = self.costs.bring_s_per_page(adapter.num_pages, is_in_arena=bool(adapter.arena_slots))
        adapter.worth = self.rates.octaves(adapter.digest) + math.log2(cost_s)
        self._idle.place(adapter)
        self._images.place(adapter)

    # --- coming ---

    def want(self, digest: str, deadline_s: float | None) -> None:
        """Ask the store for an ABSENT adapter's image."""
        adapter = self._known(digest)
        adapter.wanted_since_s = self._clock()
        self._move(adapter, ResidencyState.WANTED)
        self._emit(WantImage(digest, deadline_s))

    def _known(self, digest: str) -> Adapter:
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = self._adapters[digest] = Adapter(digest, num_claims=self.num_claims_of(digest))
        return adapter

    def image_arrived(self, spec: AdapterSpec, arena_slots: tuple[int, ...]) -> None:
        """Take over granted arena slots that hold a verified image; a second copy is freed."""
        adapter = self._known(spec.digest)
        if adapter.arena_slots or adapter.is_discarded:
            self._arena.free(arena_slots)
            return
        adapter.spec, adapter.num_pages, adapter.arena_slots = spec, len(arena_slots), arena_slots
        adapter.last_used_s = self._clock()
        if adapter.state in (ResidencyState.ABSENT, ResidencyState.WANTED):
            if adapter.wanted_since_s:
                self.costs.fetched(self._clock() - adapter.wanted_since_s)
            self._move(adapter, ResidencyState.IN_ARENA)
        else:
            self._place(adapter)

    def image_refused(self, digest: str) -> None:
        """Note that the store has no such image; nothing happens unless it is WANTED."""
        adapter = self._adapters.get(digest)
        if adapter and adapter.state is ResidencyState.WANTED:
            self._move(adapter, ResidencyState.ABSENT)

    def load(self, digest: str, may_evict: Callable[[Adapter], bool], *, deadline_s: float = math.inf) -> Room:
        """Start to load an IN_ARENA adapter if pages can be had by evicting idle adapters that may go.

        ``deadline_s`` is when the first of those it serves should have its first token.
        """
        adapter = self._adapters[digest]
        if adapter.spec is None:
            raise RuntimeError(f"adapter {digest} has no image")
        room = self._reclaim_index(may_evict)
        if room is Room.NOW:
            room = self.reclaim(adapter.num_pages, may_evict)
        if room is Room.NOW:
            adapter.pages = self._pool.allocate(adapter.num_pages, PageOwner.ADAPTER)
            adapter.index = self._indices.take()
            adapter.generation = next(self._generations)
            self._loads.append(
                AdapterLoad(
                    digest=digest,
                    index=adapter.index,
                    spec=adapter.spec,
                    pages=adapter.pages,
                    arena_slots=adapter.arena_slots,
                    deadline_s=deadline_s,
                )
            )
            adapter.loading_since_s = self._clock()
            self._move(adapter, ResidencyState.LOADING)
        return room

    def load_finished(self, digest: str) -> None:
        """Note that the runner has the adapter's pages."""
        adapter = self._adapters[digest]
        self.costs.copied(adapter.num_pages, began_s=adapter.loading_since_s, done_s=self._clock())
        if adapter.state is ResidencyState.DRAINING:
            self._leave_device(adapter)
            return
        waited_s = self._clock() - adapter.wanted_since_s
        if adapter.wanted_since_s:
            self.load_estimate_s += 0.25 * (waited_s - self.load_estimate_s)
            adapter.wanted_since_s = 0.0
        adapter.last_used_s = self._clock()
        self._move(adapter, ResidencyState.RESIDENT)

    def load_refused(self, digest: str) -> None:
        """Note that the runner did not take an adapter: pages, index and image are given back, and its pin is gone."""
        adapter = self._adapters[digest]
        if adapter.pages is None:
            raise RuntimeError(f"adapter {digest} is {adapter.state}, nothing of it was to be loaded")
        self._pool.retire(adapter.pages, NEVER)
        self._indices.give_back(adapter.index)
        adapter.pages, adapter.index = None, -1
        self._pin(adapter, False)
        self._free_arena_slots(adapter)
        self._move(adapter, ResidencyState.ABSENT)

    # --- leaving ---

    def reclaim(self, num_pages: int, may_evict: Callable[[Adapter], bool]) -> Room:
        """Make ``num_pages`` free by evicting idle adapters, oldest first; none is evicted in vain."""
        if num_pages <= self._pool.num_free:
            return Room.NOW
        victims = self._idle.choose(num_pages - self._pool.num_free - self._pool.num_retiring, may_evict)
        if victims is None:
            return Room.NO
        self._evict(victims)
        return Room.NOW if num_pages <= self._pool.num_free else Room.SOON

    def _reclaim_index(self, may_evict: Callable[[Adapter], bool]) -> Room:
        """See to a free index of the table."""
        if not self._indices.num_free and not self._indices.num_retiring:
            victims = self._idle.choose(1, may_evict)  # any adapter has a page
            if victims is None:
                return Room.NO
            self._evict(victims)
        return Room.NOW if self._indices.num_free else Room.SOON

    def _evict(self, victims: list[Adapter]) -> None:
        for adapter in victims:
            self._leave_device(adapter)

    def drop(self, digest: str) -> None:
        """Let an adapter go from device and arena as soon as nobody uses it; a pin does not save it."""
        adapter = self._adapters.get(digest)
        if adapter is None or adapter.state is ResidencyState.WANTED:
            return
        self._pin(adapter, False)
        adapter.is_discarded = True
        if adapter.state is ResidencyState.IN_ARENA:
            self._free_arena_slots(adapter)
            self._move(adapter, ResidencyState.ABSENT)
        else:
            self._drain(adapter)

    def drain(self, digest: str) -> None:
        """Let an adapter go from the device, at once or when its last lease is returned; the arena keeps its copy."""
        self._drain(self._adapters[digest])

    def _drain(self, adapter: Adapter) -> None:
        if adapter.state is ResidencyState.RESIDENT and adapter.num_leases == 0:
            self._leave_device(adapter)
        elif adapter.state in (ResidencyState.RESIDENT, ResidencyState.LOADING):
            self._move(adapter, ResidencyState.DRAINING)

    def _leave_device(self, adapter: Adapter) -> None:
        if adapter.pages is None or adapter.num_leases:
            raise RuntimeError(f"adapter {adapter.digest} has {adapter.num_leases} leases or no pages, it cannot leave")
        self._pool.retire(adapter.pages, adapter.last_step)
        self._indices.retire(adapter.index, adapter.last_step)
        adapter.pages, adapter.index = None, -1
        if adapter.is_discarded:
            self._free_arena_slots(adapter)
        self._move(adapter, ResidencyState.IN_ARENA if adapter.arena_slots else ResidencyState.ABSENT)

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

    # --- arena ---

    def evict_images(self, num_slots: int, may_evict: Callable[[Adapter], bool]) -> bool:
        """Free arena slots until ``num_slots`` are free: images nobody waits for, those worth least first.

        An adapter on the device only loses its copy in the arena; one that is being loaded is not touched.
        """
        with self._images.in_order() as images:
            while self._arena.num_free < num_slots and (adapter := next(images, None)) is not None:
                if adapter.state is not ResidencyState.IN_ARENA:
                    self._free_arena_slots(adapter)
                    self._place(adapter)
                elif may_evict(adapter) and not adapter.is_pinned:
                    self._free_arena_slots(adapter)
                    self._move(adapter, ResidencyState.ABSENT)
        return self._arena.num_free >= num_slots

    def _free_arena_slots(self, adapter: Adapter) -> None:
        self._arena.free(adapter.arena_slots)
        adapter.arena_slots = ()

    # --- the step loop ---

    def complete(self, step_id: int) -> None:
        """Note that the device is done with all steps up to ``step_id``."""
        self._indices.complete(step_id)

    def take_unloads(self) -> list[int]:
        """Return and forget the indices to unbind; do so before the loads of the same turn."""
        return self._indices.take_unloads()

    def take_loads(self) -> list[AdapterLoad]:
        """Return and forget the loads to start, the most urgent first."""
        loads, self._loads = self._loads, []
        loads.sort(key=lambda load: load.deadline_s)
        return loads

    def take_changed(self) -> set[str]:
        """Return and forget the adapters that moved."""
        changed, self._changed = self._changed, set()
        return changed

    def _move(self, adapter: Adapter, state: ResidencyState) -> None:
        self.num_resident += (state is ResidencyState.RESIDENT) - (adapter.state is ResidencyState.RESIDENT)
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
                max_rank=adapter.spec.max_rank if adapter.spec else 0,
            )
        )

    def check_integrity(self) -> None:
        """Recount pages, indices and idleness.

        Raises:
            RuntimeError: If something is lost or held by two.
        """
        on_device = [a for a in self._adapters.values() if a.is_on_device]
        pages = sum(adapter.num_pages for adapter in on_device)
        if pages != self._pool.num_adapter:
            raise RuntimeError(f"adapters have {pages} pages, the pool accounts {self._pool.num_adapter}")
        self._indices.check_integrity([adapter.index for adapter in on_device])
        self._idle.check_integrity(list(self._adapters.values()))
        self._images.check_integrity(list(self._adapters.values()))


def _has_idle_image(adapter: Adapter) -> bool:
    """Tell whether the arena's copy may be given up: it is neither on its way in nor being read."""
    return bool(adapter.arena_slots) and adapter.state not in (ResidencyState.WANTED, ResidencyState.LOADING)
