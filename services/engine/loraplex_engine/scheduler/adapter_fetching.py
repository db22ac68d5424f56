"""Fetches the adapters of waiting requests to the device, those of the next ones first.

The queue is the prediction of what will be needed: an adapter is asked of the store when its first request arrives, and
copied to the device when that request is near its turn. Those next in order *claim* their adapters, so that no load for
somebody behind them evicts these again.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_engine.adapters.adapter import Room
from loraplex_engine.messages import ResidencyState
from loraplex_engine.scheduler.eviction_rule import EvictionRule
from loraplex_engine.scheduler.request import Request

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.scheduler.eviction import PageSource
    from loraplex_engine.scheduler.request_book import RequestBook
    from loraplex_engine.scheduler.running_batch import RunningBatch
    from loraplex_engine.scheduler.size_check import SizeCheck
    from loraplex_engine.scheduler.waiting_queue import WaitingQueue

CLAIMS_AHEAD: Final = 8
"""Adapters kept or loaded for those next in order, beyond the free places in the batch."""

_ON_THE_WAY: Final = (ResidencyState.WANTED, ResidencyState.LOADING, ResidencyState.DRAINING)


class Outcome(enum.Enum):
    """What became of an eligible request."""

    GONE = "gone"  # admitted, parked or ended: no longer eligible
    NO_PLACE = "no_place"  # no slot or no token budget
    NO_PAGES = "no_pages"
    SOON = "soon"  # pages come when steps in flight are done


@dataclass(slots=True)
class Reservation:
    """For whom all pages are kept, if for anybody."""

    request: Request | None = None


class AdapterFetching:
    """Claims and loads.

    Args:
        eviction: Makes room.
        sizes: Refuses what can never fit, once its adapter's size is known.
        reservation: Shared with `Admission`.
    """

    def __init__(
        self,
        *,
        queue: WaitingQueue,
        batch: RunningBatch,
        cache: AdapterCache,
        eviction: PageSource,
        sizes: SizeCheck,
        book: RequestBook,
        reservation: Reservation,
    ) -> None:
        self._queue = queue
        self._batch = batch
        self._cache = cache
        self._eviction = eviction
        self._sizes = sizes
        self._book = book
        self._reservation = reservation

    def claim(self, request: Request) -> bool:
        """Keep a request's adapter for it if it is near enough to a place; False if it is not."""
        digest = request.adapter_digest
        if digest is None or request.has_claim:
            return True
        is_new = not self._cache.states.num_claims_of(digest)
        if is_new and self._num_ahead >= CLAIMS_AHEAD and request is not self._reservation.request:
            return False
        self._cache.states.claim(digest)
        request.has_claim = True
        return True

    @property
    def _num_ahead(self) -> int:
        """Adapters brought for more requests than there are places.

        While there are places, only loads on their way count: whoever is first in order must be able to start one,
        however many claims those have that were first before.
        """
        num_free = self._batch.state.num_free
        return self._cache.states.num_loading - num_free if num_free else self._cache.states.num_claimed

    def fetch(self, request: Request, digest: str, now_s: float) -> Outcome:
        """Move a request's adapter a state nearer to residency, and park the request if that takes time."""
        state = self._cache.state_of(digest)
        if state is ResidencyState.RESIDENT:
            return Outcome.NO_PLACE
        if state is ResidencyState.ABSENT:
            self._cache.states.want(digest, request.objective_s)
        elif state is ResidencyState.IN_ARENA:
            if self._sizes.refuse_if_too_large(request):
                return Outcome.GONE
            outcome = self._load(request, digest)
            if outcome is not None:
                return outcome
        elif state not in _ON_THE_WAY:
            raise RuntimeError(f"adapter {digest} is {state}")
        self._cache.asked_for(digest, request.objective_s)
        self._queue.park(request, now_s)
        return Outcome.GONE

    def _load(self, request: Request, digest: str) -> Outcome | None:
        """Start to load an adapter for a request; None if it is on its way."""
        num_pages = self._cache.states.num_pages_of(digest) or 0
        if not self._leaves_headroom(num_pages):
            return Outcome.NO_PAGES
        if not self.claim(request):
            return Outcome.NO_PLACE
        rule = EvictionRule({digest}, spares_claimed=request is not self._reservation.request)
        room = self._eviction.make_room(num_pages, rule)
        if room is Room.NOW:
            deadline_s = math.inf if request.objective_s is None else request.objective_s
            room = self._cache.load(digest, rule, deadline_s=deadline_s)
        if room is not Room.NOW:
            self._book.unclaim(request)
            return Outcome.SOON if room is Room.SOON else Outcome.NO_PAGES
        self._queue.shares.charge(request.share, num_pages * self._batch.state.block_tokens)
        return None

    def _leaves_headroom(self, num_pages: int) -> bool:
        """Tell whether each running request could still get one more block, so that none is preempted at once."""
        left = self._eviction.num_obtainable - num_pages
        return len(self._batch) == 0 or self._reservation.request is not None or left >= len(self._batch)

    def load_pinned(self) -> None:
        """Start the loads of pinned adapters that are not on the device, as far as idle room allows."""
        if self._cache.states.num_pinned:
            for digest in self._cache.states.pins_to_load:
                self.load_unattended(digest)

    def load_unattended(self, digest: str) -> None:
        """Load an adapter that nobody waits with (pinned, or asked for with FAIL_FAST), if idle room allows."""
        num_pages = self._cache.states.num_pages_of(digest) or 0
        has_room = self._eviction.num_obtainable - num_pages >= len(self._batch)
        if self._reservation.request is None and has_room:
            rule = EvictionRule({digest}, spares_claimed=True, queue=self._queue)
            if self._eviction.make_room(num_pages, rule) is Room.NOW:
                self._cache.load(digest, rule)
