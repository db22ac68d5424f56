"""Decides which request gets the next place in the batch, and whose adapter is loaded for it.

Admission looks at requests in the queue's order. It passes over a request that waits for its adapter, or that needs
more room than there is, so such a request blocks no other. A request passed over for lack of pages for longer than a
bound, or while nothing runs that could free any, *reserves* the pages: no other request is admitted and no adapter
loaded until it fits, so the running requests' pages flow to it and it cannot starve.

`placement` knows what a place takes; `adapter_fetching` decides which adapters are fetched, and for which requests.
Requests next in order *claim* their adapters. No load evicts a claimed adapter. A place evicts a claimed adapter only
for a request that is further ahead than the claiming one. A load only promises progress, a place is progress, so claims
cannot block each other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from loraplex_engine.messages import ResidencyState
from loraplex_engine.scheduler.placement import Outcome, Placement
from loraplex_engine.scheduler.request import Request, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.limits import EngineLimits
    from loraplex_engine.scheduler.adapter_fetching import AdapterFetching
    from loraplex_engine.scheduler.feasibility import Feasibility
    from loraplex_engine.scheduler.request_book import RequestBook

MAX_LOOKAHEAD: Final = 16
"""Misfits that one pass looks behind; this bounds the cost of a pass when thousands of requests wait."""


class Admission:
    """Moves requests from the queue to the batch.

    Args:
        limits: Tokens of one step, and how long a request may be passed over.
        book: Queue and batch.
        cache: Adapters.
        fetching: Fetches adapters.
        placement: Gives a request its place.
        feasibility: Ends requests that a place would not help.
    """

    def __init__(
        self,
        *,
        limits: EngineLimits,
        book: RequestBook,
        cache: AdapterCache,
        fetching: AdapterFetching,
        placement: Placement,
        feasibility: Feasibility,
    ) -> None:
        self._limits = limits
        self._book = book
        self._queue = book.queue
        self._batch = book.batch
        self._cache = cache
        self._fetching = fetching
        self._placement = placement
        self._feasibility = feasibility
        self._reserving: Request | None = None  # the request that all pages are kept for
        self._spared: set[str] = set()  # adapters claimed by requests that this pass has passed over
        self._seen: tuple[int, int, int, bool] | None = None  # `_signature` at the last pass
        self._obtainable_seen = 0
        self._look_again_s = math.inf

    @property
    def reserving_digests(self) -> tuple[str, ...]:
        """Adapters of the request that pages are reserved for; the growth of other requests must not evict them."""
        return self._reserving.digests if self._reserving else ()

    @property
    def is_reserving(self) -> bool:
        """True while pages are kept for one request."""
        return self._reserving is not None

    @property
    def next_look_s(self) -> float:
        """When a waiting request must be looked at although nothing has changed; infinity if none must."""
        if not len(self._queue):
            return math.inf
        return min(self._look_again_s, self._queue.next_promotion_s)

    def arrive(self, request: Request, now_s: float) -> None:
        """Start to fetch a new request's adapters from the store, if it has any and the arena lacks one."""
        states, digests = self._cache.states, request.digests
        if not digests:
            return
        is_loadable = any(states.state_of(digest) is ResidencyState.IN_ARENA for digest in digests)
        if not (is_loadable and states.have_come(digests)):
            self._fetching.fetch(request, now_s, reserving=self._reserving)

    def load_unattended(self, digest: str, beside: Iterable[str] = ()) -> None:
        """Load an adapter that no request waits with, if idle room allows; see `AdapterFetching.load_unattended`."""
        if self._reserving is None:
            self._fetching.load_unattended(digest, beside)

    def admit(self, now_s: float) -> None:
        """Admit the requests that fit, and start the loads of adapters that the next ones need."""
        if self._cache.states.num_pinned:
            for digest in self._cache.states.pins_to_load:
                self.load_unattended(digest)
        self._queue.promote(now_s)
        if self._reserving is not None and self._serve_reserving(self._reserving, now_s):
            return
        if not len(self._queue) or not self.has_changed(now_s):
            return
        try:
            self._pass(now_s)
        finally:
            self._queue.restore()
        self._remember()

    def has_changed(self, now_s: float) -> bool:
        """Tell whether a pass could find anything that the last one did not."""
        more_room = self._placement.num_obtainable > self._obtainable_seen
        return more_room or now_s >= self._look_again_s or self._seen != self._signature

    @property
    def _signature(self) -> tuple[int, int, int, bool]:
        return (self._queue.version, self._cache.states.sequence, self._batch.version, self._has_budget)

    def _remember(self) -> None:
        self._seen = self._signature
        self._obtainable_seen = self._placement.num_obtainable

    @property
    def _has_budget(self) -> bool:
        return self._batch.num_prefill_tokens < self._limits.max_num_batched_tokens

    def _pass(self, now_s: float) -> None:
        self._look_again_s = math.inf
        self._spared.clear()
        for _ in range(MAX_LOOKAHEAD):
            request = self._queue.first(now_s)
            while request is not None and (outcome := self._consider(request, now_s)) is Outcome.GONE:
                request = self._queue.first(now_s)
            if request is None:
                return
            if outcome is Outcome.SOON:
                self._look_again_s = now_s
                return
            if outcome is Outcome.NO_PAGES:
                if self._is_overdue(request, now_s) or self._is_idle:
                    self._reserving = request
                    self._serve_reserving(request, now_s)
                    return
                self._look_again_s = min(self._look_again_s, now_s + self._limits.max_pass_over_s)
            self._queue.set_aside(request)
            if request.has_claim:
                self._spared.update(request.digests)

    @property
    def _is_idle(self) -> bool:
        """True if nothing under way can make room: the first request then gets all of it, whatever others claim."""
        return len(self._batch) == 0 and self._cache.states.num_loading == 0

    def _is_overdue(self, request: Request, now_s: float) -> bool:
        if request.misfit_since_s is None:
            request.misfit_since_s = now_s
        return now_s - request.misfit_since_s > self._limits.max_pass_over_s

    def _serve_reserving(self, request: Request, now_s: float) -> bool:
        """Try the reserving request alone; False once it no longer needs the reservation."""
        is_waiting = request.state is RequestState.WAITING
        if is_waiting and not request.is_parked:
            is_waiting = self._consider(request, now_s) is not Outcome.GONE or request.is_parked
        if is_waiting and request.is_parked:
            # pages do not help while the store has yet to send an adapter
            is_waiting = self._cache.states.have_come(request.digests)
        if not is_waiting:
            self._reserving = None
        return is_waiting

    def _consider(self, request: Request, now_s: float) -> Outcome:
        outcome = Outcome.GONE  # what is returned if the request fails while it is looked at
        with self._book.answering_for(request, "while a place was sought for it"):
            outcome = self._look_at(request, now_s)
        return outcome

    def _look_at(self, request: Request, now_s: float) -> Outcome:
        if not self._cache.states.are_resident(request.digests):
            return self._fetching.fetch(request, now_s, reserving=self._reserving)
        if not self._batch.state.num_free or not self._has_budget:
            self._fetching.claim(request, is_reserving=request is self._reserving)
            return Outcome.NO_PLACE
        if self._feasibility.refuse_if_unservable(request) or self._feasibility.end_if_unreachable(request, now_s):
            return Outcome.GONE
        if request is self._reserving:
            return self._placement.seat(request, set())
        return self._placement.seat(request, self._spared | self._book.claimed_ahead_of(request))
