"""What an engine knows of one adapter, and the moves allowed between store, arena and device."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from loraplex_common.adapter_image import AdapterSpec
from numpy.typing import NDArray

from loraplex_engine.messages import ResidencyState
from loraplex_engine.pages.page_pool import Pages

_STATE = ResidencyState
TRANSITIONS: Final = {
    _STATE.ABSENT: frozenset({_STATE.WANTED, _STATE.IN_ARENA}),
    _STATE.WANTED: frozenset({_STATE.IN_ARENA, _STATE.ABSENT}),
    _STATE.IN_ARENA: frozenset({_STATE.LOADING, _STATE.ABSENT}),
    _STATE.LOADING: frozenset({_STATE.RESIDENT, _STATE.DRAINING, _STATE.ABSENT}),
    _STATE.RESIDENT: frozenset({_STATE.DRAINING, _STATE.IN_ARENA, _STATE.ABSENT}),
    _STATE.DRAINING: frozenset({_STATE.IN_ARENA, _STATE.ABSENT}),
}
NEVER: Final = -1
"""A step id before all steps."""
PATIENCE_S: Final = 10.0
"""Longest time that images needed earlier may overtake an image with a later deadline or none."""


class Room(enum.Enum):
    """When pages can be had."""

    NOW = "now"
    SOON = "soon"  # once steps in flight are done
    NO = "no"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStatus:
    """One adapter as operators and the store see it.

    Attributes:
        num_pages: Pages, and arena slots, that the image takes; 0 while unknown.
        is_in_arena: Whether the arena holds the image, whatever the state.
        generation: Rises each time the digest is loaded anew; 0 before the first load.
        sequence: Number of the engine's latest residency event when this was read.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterLoad:
    """An order to the runner: the arguments of `ModelRunner.load_adapter`, with the image's place in the arena.

    Attributes:
        deadline_s: When the first request that waits for it should have its first token; infinity if none has a
            deadline.
    """

    digest: str
    index: int
    spec: AdapterSpec
    pages: NDArray[np.int32]
    arena_slots: tuple[int, ...]
    deadline_s: float = math.inf


@dataclass(slots=True, eq=False)
class Adapter:
    """Everything the cache knows of one digest.

    Attributes:
        pages: Pages held while LOADING, RESIDENT or DRAINING; the same holds for ``index``.
        last_step: Last step launched with it when its last lease was returned.
        num_claims: Waiting requests that claim it: it was loaded or kept for them when they were next.
        is_discarded: The copy in the arena is freed too when the adapter leaves the device.
        wanted_by_s: The earliest moment by which the adapter is needed, as the store was told.
        may_warm: It may be loaded before a request asks for it; False after an operator took it off the device.
        is_warmed: It was loaded before a request asked for it, and none has asked since.
        worth: What keeping one of its pages is worth, in octaves; see `scheduler.eviction`.
    """

    digest: str
    state: ResidencyState = ResidencyState.ABSENT
    spec: AdapterSpec | None = None
    max_rank: int = 0
    num_pages: int = 0
    arena_slots: tuple[int, ...] = ()
    pages: Pages | None = None
    index: int = -1
    generation: int = 0
    num_leases: int = 0
    num_claims: int = 0
    is_pinned: bool = False
    is_discarded: bool = False
    worth: float = -math.inf
    last_step: int = NEVER
    last_used_s: float = 0.0
    wanted_since_s: float = 0.0
    wanted_by_s: float = math.inf
    loading_since_s: float = 0.0
    may_warm: bool = True
    is_warmed: bool = False

    @property
    def is_on_device(self) -> bool:
        """True while it holds pages of the pool."""
        return self.pages is not None

    @property
    def due_s(self) -> float:
        """When its image gets its turn for room: when it is needed, or `PATIENCE_S` after it was asked for."""
        return min(self.wanted_by_s, self.wanted_since_s + PATIENCE_S)

    @property
    def is_idle(self) -> bool:
        """True if it may be evicted."""
        return self.state is ResidencyState.RESIDENT and self.num_leases == 0 and not self.is_pinned

    def move_to(self, state: ResidencyState) -> None:
        """Change state.

        Raises:
            RuntimeError: If the move is not in `TRANSITIONS`.
        """
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"adapter {self.digest} cannot go from {self.state} to {state}")
        self.state = state
