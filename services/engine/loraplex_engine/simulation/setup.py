"""The parameters of a simulated engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loraplex_engine.limits import (
    GPU_STEP,
    MAX_PASS_OVER_S,
    MAX_RESIDENT_ADAPTERS,
    SchedulerLimits,
    SchedulingPolicy,
)
from loraplex_engine.pages.page_worth import EXPECTED_COST, PageWorth
from loraplex_engine.scheduler.eviction import PageSources, one_market
from loraplex_engine.simulation.copies import PINNED_COPY, SHARED_MEMORY_STORE, Link
from loraplex_engine.simulation.step_cost import StepCost

DEFAULT_POLICY: Final = SchedulingPolicy()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSetup:
    """An engine to simulate; sizes as in `EngineParams`.

    Attributes:
        cost: Gives the seconds of a step.
        copy: Link from the arena to the pool.
        store: Link from the adapter store to the arena.
        page_worth: Values a page.
        page_sources: Makes the sources of pages for KV and for adapters.
        fill_arena: Begin with as many images in the arena as it holds, lowest index first.
        jumps: Take steady decode steps at once; the outcome is the same, sooner.
    """

    cost: StepCost
    pool_bytes: int
    arena_bytes: int
    copy: Link = PINNED_COPY
    store: Link = SHARED_MEMORY_STORE
    max_model_len: int = 2048
    max_num_seqs: int = GPU_STEP[0]
    max_num_batched_tokens: int = GPU_STEP[1]
    max_pass_over_s: float = MAX_PASS_OVER_S
    max_resident_adapters: int = MAX_RESIDENT_ADAPTERS
    policy: SchedulingPolicy = DEFAULT_POLICY
    page_worth: PageWorth = EXPECTED_COST
    page_sources: PageSources = one_market
    fill_arena: bool = True
    jumps: bool = True

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.pool_bytes // self.cost.shape.pool.page_bytes

    @property
    def num_arena_slots(self) -> int:
        """Slots of the arena."""
        return self.arena_bytes // self.cost.shape.pool.page_bytes

    @property
    def limits(self) -> SchedulerLimits:
        """The scheduler's share."""
        return SchedulerLimits(
            block_tokens=self.cost.shape.pool.block_tokens,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_pass_over_s=self.max_pass_over_s,
            eos_token_ids=(),
            policy=self.policy,
        )
