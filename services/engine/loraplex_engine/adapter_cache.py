"""Residency of adapters on one engine. Skeleton of the public types; the cache follows."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_engine.messages import ResidencyState


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStatus:
    """One adapter as operators and the store see it.

    Attributes:
        num_pages: Pages, and arena slots, its image takes; 0 while unknown.
        is_in_arena: Whether the arena holds the image, whatever the state.
        generation: Rises each time the digest is loaded anew; 0 before the first load.
        sequence: Of the engine's latest residency event when this was read.
    """

    digest: str
    state: ResidencyState
    is_in_arena: bool
    num_pages: int
    is_pinned: bool
    num_leases: int
    generation: int
    idle_s: float
    max_rank: int
    sequence: int
