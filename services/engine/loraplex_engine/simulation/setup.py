"""The parameters of a simulated engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraplex_engine.limits import GPU_STEP, EngineLimits
from loraplex_engine.pages.page_worth import EXPECTED_COST, PageWorth
from loraplex_engine.scheduler.eviction import PageSources, one_market
from loraplex_engine.simulation.copies import PINNED_COPY, SHARED_MEMORY_STORE, Link
from loraplex_engine.simulation.step_cost import StepCost

if TYPE_CHECKING:
    from loraplex_engine.simulation.shapes import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationSetup:
    """An engine to simulate.

    Attributes:
        limits: What bounds it; no `eos_token_ids`, as the trace says how many tokens each request draws.
        cost: Seconds of a step.
        copy: From the arena to the pool.
        store: From the adapter store to the arena.
        page_worth: What a page is worth.
        page_sources: Where pages for KV and for adapters come from.
        fill_arena: Begin with as many images in the arena as it holds, lowest index first.
        jumps: Take steady decode steps at once; the outcome is the same, sooner.
    """

    limits: EngineLimits
    cost: StepCost
    copy: Link = PINNED_COPY
    store: Link = SHARED_MEMORY_STORE
    page_worth: PageWorth = EXPECTED_COST
    page_sources: PageSources = one_market
    fill_arena: bool = True
    jumps: bool = True

    def with_limits(self, **limits: Any) -> SimulationSetup:
        """Return the same setup with other limits; names as in `EngineLimits`."""
        return replace(self, limits=replace(self.limits, **limits))


def gpu_limits(shape: ModelShape, *, pool_bytes: int, arena_bytes: int, max_model_len: int) -> EngineLimits:
    """Return the limits of an engine on a GPU, with the sizes of steps and table that it takes by itself.

    Args:
        shape: The model, which says how large a page is.
        pool_bytes: Device memory of each rank's page pool; rounded down to whole pages.
        arena_bytes: Host memory of the arena, of all ranks together; rounded down to whole pages.
        max_model_len: Longest sequence, in tokens.
    """
    return EngineLimits(
        pool=shape.pool,
        num_pages=pool_bytes // shape.pool.page_bytes,
        num_arena_slots=arena_bytes // (shape.pool.page_bytes * shape.tp_degree),
        max_model_len=max_model_len,
        max_num_seqs=GPU_STEP[0],
        max_num_batched_tokens=GPU_STEP[1],
    )
