"""Residency of adapters on one engine: where each image is, which requests lease it, and what is evicted for room.

Accounting only, on the step loop's thread, which has the runner carry out the loads and unloads decided here. Counted are
pages of the pool (shared with KV), indices of the runner's adapter table, and slots of the host arena. An adapter without
leases and pins is *idle*; idle adapters are evicted by worth (`ranking`), and the arena keeps its copy. A *claim* of a
waiting request outranks other waiting requests, not running ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraplex_engine.adapters.adapter import NEVER, Adapter, Room
from loraplex_engine.adapters.device_loads import DeviceLoads
from loraplex_engine.adapters.ranking import AdapterRanking
from loraplex_engine.adapters.shared_modules import SharedModules
from loraplex_engine.adapters.states import AdapterStates
from loraplex_engine.adapters.warm_order import WarmCounts, WarmResult
from loraplex_engine.limits import DEFAULT_HALF_LIFE_S
from loraplex_engine.messages import ResidencyState, StoreEvent
from loraplex_engine.pages.page_pool import PageOwner, PagePool
from loraplex_engine.pages.page_worth import EXPECTED_COST

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.adapter_image import AdapterSpec

    from loraplex_engine.adapters.arena import HostArena
    from loraplex_engine.pages.page_worth import PageWorth


class AdapterCache:
    """Moves adapters between store, arena and device, with the pages, indices and slots that they take.

    Args:
        pool: Pages, shared with KV.
        arena: Host memory that holds the images that arrived.
        max_resident: Size of the runner's adapter table.
        emit: Sink of `WantImage` and `ResidencyChanged`.
        clock: Seconds, monotonic.
        half_life_s: Time in seconds after which an arrival counts half in an adapter's worth.
        page_worth: Values an adapter.

    Attributes:
        ranking: What adapters are worth, and which is evicted first.
        states: State, claims and pin of each adapter.
        loads: Loads and unloads that the runner has yet to carry out.
        warm: What became of adapters that were loaded before a request asked for them.
        num_leases: Leases of all adapters together.
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
        page_worth: PageWorth = EXPECTED_COST,
    ) -> None:
        self._pool = pool
        self._arena = arena
        self._clock = clock
        self.ranking = AdapterRanking(page_worth=page_worth, half_life_s=half_life_s)
        self.states = AdapterStates(self.ranking, emit=emit, clock=clock)
        self.loads = DeviceLoads(max_resident)
        self._modules = SharedModules()
        self.warm = WarmCounts()
        self.num_leases = 0

    def state_of(self, digest: str) -> ResidencyState:
        """Return an adapter's state; ABSENT if it is unknown."""
        return self.states.state_of(digest)

    # --- leases ---

    def lease(self, digest: str) -> int:
        """Keep an adapter from eviction and return its index in the runner's table.

        Raises:
            RuntimeError: If it is not RESIDENT: the caller asks `state_of` in the same step.
        """
        adapter = self.states[digest]
        if adapter.state is not ResidencyState.RESIDENT:
            raise RuntimeError(f"adapter {digest} is {adapter.state}, it cannot be leased")
        adapter.num_leases += 1
        self.num_leases += 1
        adapter.last_used_s = self._clock()
        self.warm.settle(adapter, WarmResult.USEFUL)
        self.ranking.place(adapter)
        if adapter.num_leases == 1:  # only whether there is a lease is reported, not each one
            self.states.report(adapter)
        return adapter.index

    def release(self, digest: str, last_step: int) -> None:
        """Return a lease; ``last_step`` is the last step launched so far.

        Raises:
            RuntimeError: If there is no lease.
        """
        adapter = self.states[digest]
        if adapter.num_leases == 0:
            raise RuntimeError(f"adapter {digest} has no lease to return")
        adapter.num_leases -= 1
        self.num_leases -= 1
        adapter.last_used_s = self._clock()
        adapter.last_step = last_step
        if adapter.num_leases == 0 and adapter.state is ResidencyState.DRAINING:
            self.evict(adapter)
            return
        self.ranking.place(adapter)
        if adapter.num_leases == 0:
            self.states.report(adapter)

    # --- coming ---

    def asked_for(self, digest: str, deadline_s: float | None) -> None:
        """Note that one more request waits for an adapter on its way; the store is told if its deadline is earlier."""
        adapter = self.states[digest]
        if adapter.state is ResidencyState.LOADING:
            self.warm.settle(adapter, WarmResult.LATE)
        elif adapter.state is ResidencyState.WANTED and deadline_s is not None:
            self.states.hasten(adapter, deadline_s)

    def image_arrived(self, spec: AdapterSpec, arena_slots: tuple[int, ...]) -> None:
        """Take over granted arena slots that hold a verified image; the slots of a second copy are freed."""
        adapter = self.states.know(spec.digest)
        if adapter.arena_slots or adapter.is_discarded:
            self._arena.free(arena_slots)
            return
        adapter.spec, adapter.num_pages, adapter.arena_slots = self._modules.share(spec), len(arena_slots), arena_slots
        adapter.max_rank, adapter.last_used_s = spec.max_rank, self._clock()
        if adapter.state in (ResidencyState.ABSENT, ResidencyState.WANTED):
            if adapter.wanted_since_s:
                self.ranking.costs.fetched(self._clock() - adapter.wanted_since_s)
            self.states.move(adapter, ResidencyState.IN_ARENA)
        else:
            self.ranking.place(adapter)

    def load(
        self,
        digest: str,
        may_evict: Callable[[Adapter], bool],
        *,
        deadline_s: float = math.inf,
        is_warming: bool = False,
    ) -> Room:
        """Start to load an IN_ARENA adapter if pages can be had, by evicting idle adapters if needed.

        Args:
            digest: The adapter.
            may_evict: Tells which idle adapters may be evicted.
            deadline_s: When the first request that it serves should have its first token.
            is_warming: Whether no request has asked for it yet.
        """
        adapter = self.states[digest]
        room = self.reclaim_indices(1, may_evict)
        if room is Room.NOW:
            room = self.reclaim(adapter.num_pages, may_evict)
        if room is Room.NOW:
            adapter.pages = self._pool.allocate(adapter.num_pages, PageOwner.ADAPTER)
            self.loads.start(adapter, deadline_s)
            adapter.loading_since_s = self._clock()
            adapter.is_warmed = is_warming
            self.states.move(adapter, ResidencyState.LOADING)
        return room

    def load_finished(self, digest: str) -> None:
        """Note that the runner has the adapter's pages."""
        adapter = self.states[digest]
        if not (adapter.spec and adapter.spec.has_magnitudes):  # such a load is more than a copy
            self.ranking.costs.copied(adapter.num_pages, began_s=adapter.loading_since_s, done_s=self._clock())
        if adapter.state is ResidencyState.DRAINING:
            self.evict(adapter)
            return
        if adapter.wanted_since_s:
            self.ranking.costs.became_resident(self._clock() - adapter.wanted_since_s)
            adapter.wanted_since_s = 0.0
        adapter.last_used_s = self._clock()
        self.states.move(adapter, ResidencyState.RESIDENT)

    def load_refused(self, digest: str) -> None:
        """Note that the runner refused an adapter: its pages, index, image and pin are given up."""
        adapter = self.states[digest]
        if adapter.pages is None:
            raise RuntimeError(f"adapter {digest} is {adapter.state}, nothing of it was to be loaded")
        self._pool.retire(adapter.pages, NEVER)
        self.loads.indices.give_back(adapter.index)
        adapter.pages, adapter.index = None, -1
        self.states.pin(adapter, False)
        self._free_arena_slots(adapter)
        self.states.move(adapter, ResidencyState.ABSENT)

    # --- leaving ---

    def reclaim(self, num_pages: int, may_evict: Callable[[Adapter], bool]) -> Room:
        """Make ``num_pages`` free by evicting idle adapters, those worth least first; none if that is not enough."""
        if num_pages <= self._pool.num_free:
            return Room.NOW
        victims = self.ranking.choose_idle(num_pages - self._pool.num_free - self._pool.num_retiring, may_evict)
        if victims is None:
            return Room.NO
        for adapter in victims:
            self.evict(adapter)
        return Room.NOW if num_pages <= self._pool.num_free else Room.SOON

    def reclaim_indices(self, count: int, may_evict: Callable[[Adapter], bool]) -> Room:
        """Make ``count`` indices of the adapter table free; none if that is not enough."""
        indices = self.loads.indices
        victims = self.ranking.choose_idle_adapters(count - indices.num_free - indices.num_retiring, may_evict)
        if victims is None:
            return Room.NO
        for adapter in victims:
            self.evict(adapter)
        return Room.NOW if indices.num_free >= count else Room.SOON

    def drop(self, digest: str) -> None:
        """Take an adapter off device and arena as soon as it has no lease; a pin does not save it."""
        adapter = self.states.get(digest)
        if adapter is None or adapter.state is ResidencyState.WANTED:
            return
        self.states.pin(adapter, False)
        adapter.is_discarded = True
        if adapter.state is ResidencyState.IN_ARENA:
            self._free_arena_slots(adapter)
            self.states.move(adapter, ResidencyState.ABSENT)
        else:
            self._drain(adapter)

    def drain(self, digest: str) -> None:
        """Take an adapter off the device, at once or when its last lease is returned; the arena keeps its copy."""
        adapter = self.states[digest]
        adapter.may_warm = False
        self._drain(adapter)

    def _drain(self, adapter: Adapter) -> None:
        if adapter.state is ResidencyState.RESIDENT and adapter.num_leases == 0:
            self.evict(adapter)
        elif adapter.state in (ResidencyState.RESIDENT, ResidencyState.LOADING):
            self.states.move(adapter, ResidencyState.DRAINING)

    def evict(self, adapter: Adapter) -> None:
        """Take an adapter off the device; the arena keeps its copy unless the adapter was dropped.

        Raises:
            RuntimeError: If it has leases, or is not on the device.
        """
        if adapter.pages is None or adapter.num_leases:
            raise RuntimeError(f"adapter {adapter.digest} has {adapter.num_leases} leases or no pages, it cannot leave")
        self.warm.settle(adapter, WarmResult.WASTED)
        self._pool.retire(adapter.pages, adapter.last_step)
        self.loads.indices.retire(adapter.index, adapter.last_step)
        adapter.pages, adapter.index = None, -1
        if adapter.is_discarded:
            self._free_arena_slots(adapter)
        self.states.move(adapter, ResidencyState.IN_ARENA if adapter.arena_slots else ResidencyState.ABSENT)

    # --- arena ---

    def evict_images(self, num_slots: int, may_evict: Callable[[Adapter], bool]) -> bool:
        """Evict images that may go, those worth least first, until ``num_slots`` arena slots are free.

        An adapter on the device only loses its copy in the arena; one that is being loaded is not touched.
        """
        with self.ranking.images_in_order() as images:
            while self._arena.num_free < num_slots and (adapter := next(images, None)) is not None:
                if adapter.state is not ResidencyState.IN_ARENA:
                    self._free_arena_slots(adapter)
                    self.ranking.place(adapter)
                elif may_evict(adapter) and not adapter.is_pinned:
                    self._free_arena_slots(adapter)
                    self.states.move(adapter, ResidencyState.ABSENT)
        return self._arena.num_free >= num_slots

    def _free_arena_slots(self, adapter: Adapter) -> None:
        self._arena.free(adapter.arena_slots)
        adapter.arena_slots = ()

    # --- the step loop ---

    def complete(self, step_id: int) -> None:
        """Note that the device is done with all steps up to ``step_id``."""
        self.loads.indices.complete(step_id)

    def check_integrity(self) -> None:
        """Recount pages, indices, claims and orders.

        Raises:
            RuntimeError: If something is lost or counted twice.
        """
        on_device = [a for a in self.states.all if a.is_on_device]
        if (pages := sum(adapter.num_pages for adapter in on_device)) != self._pool.num_adapter:
            raise RuntimeError(f"adapters have {pages} pages, the pool accounts {self._pool.num_adapter}")
        self.loads.indices.check_integrity([adapter.index for adapter in on_device])
        self.states.check_integrity()
        self.ranking.check_integrity(self.states.all)
