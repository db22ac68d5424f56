"""All that an engine decides with, wired once: pages, arena, adapters, requests, and the grants of arena slots.

The engine, the simulator, benchmarks and tests build the same state and differ in what computes the steps it decides on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_engine.adapters.cache import AdapterCache
from loraplex_engine.loop.arena_grants import ArenaGrants
from loraplex_engine.pages.page_pool import PagePool
from loraplex_engine.pages.page_worth import EXPECTED_COST
from loraplex_engine.scheduler.eviction import one_market
from loraplex_engine.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.adapters.arena import HostArena
    from loraplex_engine.constraints.types import MaskFiller
    from loraplex_engine.limits import EngineLimits
    from loraplex_engine.messages import StoreEvent
    from loraplex_engine.pages.page_worth import PageWorth
    from loraplex_engine.scheduler.eviction import PageSources


class EngineState:
    """Accounts of pages, adapters and requests; all of it belongs to one thread, the arena's allocator excepted.

    Args:
        limits: Sizes.
        arena: Slots for adapter images; closed by its owner, not here.
        emit: Gets `WantImage` and `ResidencyChanged`, in order.
        clock: Seconds, monotonic.
        page_worth: What a page is worth, unless a benchmark compares another rule.
        page_sources: Where pages come from when they are short, unless a benchmark compares another rule.
        filler: Fills the masks of structured outputs; None if no request has one.

    Attributes:
        limits: Sizes.
        filler: Fills the masks of structured outputs.
        pool: The owner of each page.
        arena: Slots for adapter images.
        cache: Where each adapter stands.
        scheduler: Which requests run, and what a step computes.
        grants: Which image on offer gets slots of the arena.
    """

    def __init__(
        self,
        limits: EngineLimits,
        arena: HostArena,
        *,
        emit: Callable[[StoreEvent], None],
        clock: Callable[[], float],
        page_worth: PageWorth = EXPECTED_COST,
        page_sources: PageSources = one_market,
        filler: MaskFiller | None = None,
    ) -> None:
        self.limits = limits
        self.filler = filler
        self.arena = arena
        self.pool = PagePool(limits.num_pages, clock)
        self.cache = AdapterCache(
            pool=self.pool,
            arena=arena,
            max_resident=limits.max_resident_adapters,
            emit=emit,
            clock=clock,
            half_life_s=limits.policy.half_life_s,
            page_worth=page_worth,
        )
        self.scheduler = Scheduler(
            limits=limits, pool=self.pool, cache=self.cache, clock=clock, page_sources=page_sources
        )
        self.grants = ArenaGrants(cache=self.cache, arena=arena, queue=self.scheduler.queue)

    def check_integrity(self) -> None:
        """Recount pages, leases, requests and slots.

        Raises:
            RuntimeError: If something is lost or counted twice.
        """
        self.scheduler.check_integrity()
        self.arena.check_integrity()
