"""Fetches the adapters of waiting requests to the device, those of the next requests first.

The queue predicts which adapters will be needed. The engine asks the store for an adapter when its first request
arrives, and copies the adapter to the device when that request is near its turn. Requests that are next in order
*claim* their adapters, so that no load for a request behind them evicts these adapters again.

A request with several adapters claims and loads all of them or none, once all their images have come: what it holds on the
device is always enough to let it run, so no two requests each hold what the other lacks (ADR 34).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from loraplex_engine.adapters.adapter import Room
from loraplex_engine.messages import ResidencyState
from loraplex_engine.scheduler.eviction_rule import EvictionRule
from loraplex_engine.scheduler.placement import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.scheduler.eviction import PageSource
    from loraplex_engine.scheduler.feasibility import Feasibility
    from loraplex_engine.scheduler.request import Request
    from loraplex_engine.scheduler.request_book import RequestBook

CLAIMS_AHEAD: Final = 8
"""Adapters kept or loaded for the requests next in order, beyond the free places in the batch."""

_ON_THE_WAY: Final = (ResidencyState.WANTED, ResidencyState.LOADING, ResidencyState.DRAINING)


class AdapterFetching:
    """Claims adapters for waiting requests and starts their loads.

    Args:
        source: Makes room for adapters.
        feasibility: Refuses a request that can never fit, once its adapter's size is known.
    """

    def __init__(self, *, book: RequestBook, cache: AdapterCache, source: PageSource, feasibility: Feasibility) -> None:
        self._book = book
        self._queue = book.queue
        self._batch = book.batch
        self._cache = cache
        self._source = source
        self._feasibility = feasibility

    def claim(self, request: Request, *, is_reserving: bool) -> bool:
        """Keep a request's adapters for it.

        Returns:
            False if the request is too far from a place, and no pages are reserved for it.
        """
        if not request.digests or request.has_claim:
            return True
        is_new = any(not self._cache.states.num_claims_of(digest) for digest in request.digests)
        if is_new and self._num_ahead >= CLAIMS_AHEAD and not is_reserving:
            return False
        self._book.claim(request)
        return True

    @property
    def _num_ahead(self) -> int:
        """Adapters fetched for more requests than there are places.

        While there are free places, only loads on their way count: the first request in order must be able to start a
        load, however many claims are held by requests that were first before.
        """
        num_free = self._batch.state.num_free
        return self._cache.states.num_loading - num_free if num_free else self._cache.states.num_claimed

    def fetch(self, request: Request, now_s: float, *, reserving: Request | None) -> Outcome:
        """Move a request's adapters a state nearer to residency, and park the request if that takes time.

        Args:
            request: The request.
            now_s: Now.
            reserving: The request that all pages are kept for, if there is one.
        """
        states, digests = self._cache.states, request.digests
        if request.adds_up and self._feasibility.refuse_if_unservable(request):
            return Outcome.GONE  # an image on offer has a size, and may be too large beside the others
        for digest in digests:
            if states.state_of(digest) is ResidencyState.ABSENT:
                states.want(digest, request.objective_s, request.submission.traceparent)
        if states.have_come(digests):
            lacking = [digest for digest in digests if states.state_of(digest) is ResidencyState.IN_ARENA]
            if lacking and self._feasibility.refuse_if_unservable(request):
                return Outcome.GONE
            outcome = self._load(request, lacking, reserving) if lacking else None
            if outcome is not None:
                return outcome
        coming = [digest for digest in digests if states.state_of(digest) in _ON_THE_WAY]
        if not coming:
            return Outcome.NO_PLACE
        for digest in coming:
            self._cache.asked_for(digest, request.objective_s)
        self._queue.park(request, now_s)
        return Outcome.GONE

    def _load(self, request: Request, digests: list[str], reserving: Request | None) -> Outcome | None:
        """Start to load all adapters that a request lacks, or none; None if they are on their way."""
        num_pages = sum(self._cache.states.num_pages_of(digest) or 0 for digest in digests)
        if reserving is None and not self._leaves_headroom(num_pages):
            return Outcome.NO_PAGES
        if not self.claim(request, is_reserving=request is reserving):
            return Outcome.NO_PLACE
        rule = EvictionRule(set(request.digests), spares_claimed=request is not reserving)
        room = self._source.make_room(num_pages, rule)
        if room is Room.NOW:
            room = self._cache.reclaim_indices(len(digests), rule)
        deadline_s = math.inf if request.objective_s is None else request.objective_s
        for digest in digests:
            if room is Room.NOW:
                room = self._cache.load(digest, rule, deadline_s=deadline_s)
        if room is not Room.NOW:
            self._book.unclaim(request)
            return Outcome.SOON if room is Room.SOON else Outcome.NO_PAGES
        self._queue.shares.charge(request.share, num_pages * self._batch.state.block_tokens)
        return None

    def _leaves_headroom(self, num_pages: int) -> bool:
        """Tell whether each running request could still get one more block, so that none is preempted at once."""
        return len(self._batch) == 0 or self._source.num_obtainable - num_pages >= len(self._batch)

    def load_unattended(self, digest: str, beside: Iterable[str] = ()) -> None:
        """Load an adapter that no request waits with (pinned, or asked for with FAIL_FAST), if idle room allows.

        Args:
            digest: The adapter.
            beside: Adapters that are not evicted for it: it is needed together with them.
        """
        num_pages = self._cache.states.num_pages_of(digest) or 0
        if self._source.num_obtainable - num_pages >= len(self._batch):
            rule = EvictionRule({digest, *beside}, spares_claimed=True, queue=self._queue)
            if self._source.make_room(num_pages, rule) is Room.NOW:
                self._cache.load(digest, rule)

    # --- news of images ---

    def image_arrived(self, digest: str) -> bool:
        """Tell the requests that wait with an adapter how far it has come; False if no request waits with it."""
        waiting = self._queue.of_adapter(digest)
        for request in waiting:
            with self._book.answering_for(request, "when its adapter arrived"):
                if not self._feasibility.refuse_if_unservable(request):
                    self._book.report_loading(request)
        return bool(waiting)
