"""State, claims and pin of every adapter on one engine, and the events that report them.

`AdapterCache` decides the moves that take or free pages, table indices and arena slots.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraplex_engine.adapters.adapter import Adapter, AdapterStatus
from loraplex_engine.messages import ResidencyChanged, ResidencyState, WantImage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from loraplex_common.adapter_image import AdapterSpec

    from loraplex_engine.adapters.ranking import AdapterRanking
    from loraplex_engine.messages import StoreEvent


class AdapterStates:
    """All adapters that this engine holds or waits for.

    Args:
        ranking: Is told of every change to an adapter's worth, or to whether it may be evicted.
        emit: Sink of `WantImage` and `ResidencyChanged`.
        clock: Seconds, monotonic.

    Attributes:
        sequence: Number of the latest `ResidencyChanged`.
        num_resident: Adapters that can be leased.
        num_loading: Adapters being copied to the device.
        num_hastened: How often an image on its way turned out to be needed earlier.
    """

    def __init__(
        self, ranking: AdapterRanking, *, emit: Callable[[StoreEvent], None], clock: Callable[[], float]
    ) -> None:
        self._ranking = ranking
        self._emit = emit
        self._clock = clock
        self._adapters: dict[str, Adapter] = {}
        self._pinned: set[str] = set()
        self._claims: dict[str, int] = {}
        self._changed: set[str] = set()
        self.sequence = 0
        self.num_resident = 0
        self.num_loading = 0
        self.num_hastened = 0

    def __getitem__(self, digest: str) -> Adapter:
        return self._adapters[digest]

    def get(self, digest: str) -> Adapter | None:
        """Return an adapter; None if it is unknown."""
        return self._adapters.get(digest)

    @property
    def all(self) -> list[Adapter]:
        """Every adapter, as a copy."""
        return list(self._adapters.values())

    # --- questions ---

    def state_of(self, digest: str) -> ResidencyState:
        """Return an adapter's state; ABSENT if it is unknown."""
        adapter = self._adapters.get(digest)
        return adapter.state if adapter else ResidencyState.ABSENT

    def have_come(self, digests: Iterable[str]) -> bool:
        """Tell whether the images of these adapters are all in the arena or on the device."""
        return all(self.state_of(digest) not in (ResidencyState.ABSENT, ResidencyState.WANTED) for digest in digests)

    def are_resident(self, digests: Iterable[str]) -> bool:
        """Tell whether these adapters can all be leased."""
        return all(self.state_of(digest) is ResidencyState.RESIDENT for digest in digests)

    def due_s(self, digest: str) -> float:
        """Return when a WANTED adapter's image gets its turn for room in the arena; -inf if the adapter is unknown."""
        adapter = self._adapters.get(digest)
        return adapter.due_s if adapter else -math.inf

    def spec_of(self, digest: str | None) -> AdapterSpec | None:
        """Return what is known of an adapter; None until its image has arrived once, or without an adapter."""
        adapter = self._adapters.get(digest) if digest is not None else None
        return adapter.spec if adapter is not None else None

    def num_pages_of(self, digest: str) -> int | None:
        """Return the pages that an adapter takes; None until its image has been seen or offered."""
        adapter = self._adapters.get(digest)
        return adapter.num_pages if adapter and adapter.num_pages else None

    @property
    def num_pinned(self) -> int:
        """Number of pinned adapters."""
        return len(self._pinned)

    @property
    def num_pinned_pages(self) -> int:
        """Pages of pinned adapters, on the device or on their way."""
        return sum(self._adapters[digest].num_pages for digest in self._pinned)

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
        """Note that a request asks for an adapter, or a hint predicts one; the adapter's worth rises."""
        self._ranking.rates.count(digest, self._clock(), weight)
        adapter = self._adapters.get(digest)
        if adapter is not None:
            adapter.may_warm = True
            self._ranking.place(adapter)

    def claim(self, digest: str) -> None:
        """Keep an adapter for a waiting request that is next in order."""
        self._set_claims(digest, self.num_claims_of(digest) + 1)

    def unclaim(self, digest: str) -> None:
        """Take a claim back; the adapter itself may be gone.

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
            self._ranking.place(adapter)

    def num_claims_of(self, digest: str) -> int:
        """Return how many waiting requests claim an adapter."""
        return self._claims.get(digest, 0)

    @property
    def num_claimed(self) -> int:
        """Adapters that waiting requests claim."""
        return len(self._claims)

    @property
    def claims(self) -> dict[str, int]:
        """How many waiting requests claim each claimed adapter, a copy."""
        return dict(self._claims)

    # --- the store ---

    def want(self, digest: str, deadline_s: float | None, traceparent: str = "") -> None:
        """Ask the store for an ABSENT adapter's image; ``traceparent`` is that of the request which needs it."""
        adapter = self.know(digest)
        adapter.wanted_since_s = self._clock()
        adapter.wanted_by_s = math.inf if deadline_s is None else deadline_s
        self.move(adapter, ResidencyState.WANTED)
        self._emit(WantImage(digest, deadline_s, traceparent))

    def hasten(self, adapter: Adapter, deadline_s: float) -> None:
        """Tell the store of a WANTED adapter's earlier deadline; a later one changes nothing."""
        if deadline_s < adapter.wanted_by_s:
            adapter.wanted_by_s = deadline_s
            self.num_hastened += 1
            self._emit(WantImage(adapter.digest, deadline_s))

    def image_refused(self, digest: str) -> None:
        """Note that the store has no such image; nothing happens unless the adapter is WANTED."""
        adapter = self._adapters.get(digest)
        if adapter and adapter.state is ResidencyState.WANTED:
            self.move(adapter, ResidencyState.ABSENT)

    def note_size(self, digest: str, num_pages: int, *, is_news: bool) -> None:
        """Note how many pages an image on offer has; ``is_news`` has the requests that wait with it looked at again."""
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.state is ResidencyState.WANTED:
            adapter.num_pages = num_pages
            if is_news:
                self._changed.add(digest)

    # --- pins ---

    def set_pinned(self, digest: str, is_pinned: bool) -> None:
        """Keep an adapter that the engine holds in the pool whatever the pressure, or end that."""
        adapter = self._adapters[digest]
        if adapter.is_pinned != is_pinned:
            self.pin(adapter, is_pinned)
            self.report(adapter)

    def pin(self, adapter: Adapter, is_pinned: bool) -> None:
        """Pin or unpin an adapter without reporting it."""
        adapter.is_pinned = is_pinned
        (self._pinned.add if is_pinned else self._pinned.discard)(adapter.digest)
        self._ranking.place(adapter)

    @property
    def pins_to_load(self) -> list[str]:
        """Pinned adapters that are only in the arena."""
        return [d for d in sorted(self._pinned) if self._adapters[d].state is ResidencyState.IN_ARENA]

    @property
    def changed(self) -> frozenset[str]:
        """The adapters that `take_changed` would return."""
        return frozenset(self._changed)

    def take_changed(self) -> set[str]:
        """Return and forget the adapters whose state has changed."""
        changed, self._changed = self._changed, set()
        return changed

    # --- moves ---

    def know(self, digest: str) -> Adapter:
        """Return an adapter; an unknown one becomes known as ABSENT."""
        adapter = self._adapters.get(digest)
        if adapter is None:
            adapter = self._adapters[digest] = Adapter(digest, num_claims=self.num_claims_of(digest))
        return adapter

    def move(self, adapter: Adapter, state: ResidencyState) -> None:
        """Change an adapter's state and report it; an adapter that becomes ABSENT is forgotten.

        Raises:
            RuntimeError: If the move is not allowed.
        """
        self.num_resident += (state is ResidencyState.RESIDENT) - (adapter.state is ResidencyState.RESIDENT)
        self.num_loading += (state is ResidencyState.LOADING) - (adapter.state is ResidencyState.LOADING)
        adapter.move_to(state)
        self._ranking.place(adapter)
        self._changed.add(adapter.digest)
        self.report(adapter)
        if state is ResidencyState.ABSENT:
            del self._adapters[adapter.digest]

    def report(self, adapter: Adapter) -> None:
        """Emit an adapter's present state."""
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

    def check_integrity(self) -> None:
        """Recount claims.

        Raises:
            RuntimeError: If an adapter has other claims than are accounted.
        """
        claims = {adapter.digest: adapter.num_claims for adapter in self.all if adapter.num_claims}
        if any(self._claims.get(digest) != count for digest, count in claims.items()):
            raise RuntimeError(f"adapters have claims {claims}, accounted are {self._claims}")
