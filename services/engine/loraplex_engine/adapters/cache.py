"""Residency of adapters on one engine: which image is where, who leases it, and what gives way when room is needed.

Accounting only: loads and unloads are handed to the step loop, which has the runner carry them out. Belongs to the
step loop's thread. Three resources are behind it: pages of the pool (shared with KV), indices of the runner's adapter
table, and slots of the host arena (see `arena_grants`).

An adapter without leases and pins is *idle*; idle adapters give way by worth (`scheduler.eviction`), those asked for least and
cheapest to bring back first. The image stays in the arena if it is there. A *claim* is a waiting request's hold on an
adapter that was brought for it: it outranks other waiting requests, not running ones.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.adapters.adapter import NEVER, Adapter, AdapterLoad, Room
from loraplex_engine.adapters.arrival_rates import DEFAULT_HALF_LIFE_S
from loraplex_engine.adapters.eviction_order import TableIndices
from loraplex_engine.adapters.ranking import AdapterRegister
from loraplex_engine.adapters.shared_modules import SharedModules
from loraplex_engine.adapters.warm_order import WarmResult
from loraplex_engine.messages import ResidencyState, StoreEvent, WantImage
from loraplex_engine.pages.page_pool import PageOwner, PagePool
from loraplex_engine.pages.page_worth import EXPECTED_COST

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_common.adapter_image import AdapterSpec

    from loraplex_engine.adapters.arena import HostArena
    from loraplex_engine.pages.page_worth import PageWorth


class AdapterCache(AdapterRegister):
    """The state machine of every adapter, and the eviction order over the pool's pages.

    Args:
        pool: Pages, shared with KV.
        arena: Host memory; images that arrived lie in it.
        max_resident: Size of the runner's adapter table.
        emit: Sink of `WantImage` and `ResidencyChanged`.
        clock: Seconds, monotonic.
        half_life_s: After which an arrival counts half in an adapter's worth.
        page_worth: What an adapter is worth.

    Attributes:
        max_resident: Size of the runner's adapter table.
        load_estimate_s: Moving average of the time from a want to residency.
        num_hastened: Times that an image on its way turned out to be needed earlier.
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
        super().__init__(pool=pool, emit=emit, clock=clock, half_life_s=half_life_s, page_worth=page_worth)
        self._arena = arena
        self._indices = TableIndices(max_resident)
        self._modules = SharedModules()
        self._loads: list[AdapterLoad] = []
        self._generations = itertools.count(1)
        self.max_resident = max_resident
        self.load_estimate_s = 1.0
        self.num_hastened = 0

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
        self._count_warm(adapter, WarmResult.USEFUL)
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

    def evict(self, adapter: Adapter) -> None:
        """Free an idle adapter's pages."""
        self._leave_device(adapter)

    # --- coming ---

    def want(self, digest: str, deadline_s: float | None) -> None:
        """Ask the store for an ABSENT adapter's image."""
        adapter = self._known(digest)
        adapter.wanted_since_s = self._clock()
        adapter.wanted_by_s = math.inf if deadline_s is None else deadline_s
        self._move(adapter, ResidencyState.WANTED)
        self._emit(WantImage(digest, deadline_s))

    def asked_for(self, digest: str, deadline_s: float | None) -> None:
        """Note that one more request waits for an adapter on its way: the store hears of an earlier deadline."""
        adapter = self._adapters[digest]
        if adapter.state is ResidencyState.LOADING:
            self._count_warm(adapter, WarmResult.LATE)
        elif adapter.state is ResidencyState.WANTED and deadline_s is not None and deadline_s < adapter.wanted_by_s:
            adapter.wanted_by_s = deadline_s
            self.num_hastened += 1
            self._emit(WantImage(digest, deadline_s))

    def image_arrived(self, spec: AdapterSpec, arena_slots: tuple[int, ...]) -> None:
        """Take over granted arena slots that hold a verified image; a second copy is freed."""
        adapter = self._known(spec.digest)
        if adapter.arena_slots or adapter.is_discarded:
            self._arena.free(arena_slots)
            return
        adapter.spec, adapter.num_pages, adapter.arena_slots = self._modules.share(spec), len(arena_slots), arena_slots
        adapter.max_rank, adapter.last_used_s = spec.max_rank, self._clock()
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

    def load(
        self,
        digest: str,
        may_evict: Callable[[Adapter], bool],
        *,
        deadline_s: float = math.inf,
        is_warming: bool = False,
    ) -> Room:
        """Start to load an IN_ARENA adapter if pages can be had by evicting idle adapters that may go.

        Args:
            digest: Which.
            may_evict: Which idle adapters may give way.
            deadline_s: When the first of those it serves should have its first token.
            is_warming: Whether nobody has asked for it yet.
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
                    pages=adapter.pages.astype(np.int32),
                    arena_slots=adapter.arena_slots,
                    deadline_s=deadline_s,
                )
            )
            adapter.loading_since_s = self._clock()
            adapter.is_warmed = is_warming
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
        adapter = self._adapters[digest]
        adapter.may_warm = False
        self._drain(adapter)

    def _drain(self, adapter: Adapter) -> None:
        if adapter.state is ResidencyState.RESIDENT and adapter.num_leases == 0:
            self._leave_device(adapter)
        elif adapter.state in (ResidencyState.RESIDENT, ResidencyState.LOADING):
            self._move(adapter, ResidencyState.DRAINING)

    def _leave_device(self, adapter: Adapter) -> None:
        if adapter.pages is None or adapter.num_leases:
            raise RuntimeError(f"adapter {adapter.digest} has {adapter.num_leases} leases or no pages, it cannot leave")
        self._count_warm(adapter, WarmResult.WASTED)
        self._pool.retire(adapter.pages, adapter.last_step)
        self._indices.retire(adapter.index, adapter.last_step)
        adapter.pages, adapter.index = None, -1
        if adapter.is_discarded:
            self._free_arena_slots(adapter)
        self._move(adapter, ResidencyState.IN_ARENA if adapter.arena_slots else ResidencyState.ABSENT)

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
        super().check_integrity()
