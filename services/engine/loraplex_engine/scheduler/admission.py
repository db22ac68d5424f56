"""Who gets the next place in a batch, and whose adapter is loaded for it.

In the queue's order, passing over those that wait for their adapter or for more room than there is: no misfit blocks the
others. Who is passed over for lack of pages for longer than a bound, or while nothing runs that could free any, *reserves*
them: nobody is admitted and no adapter loaded until it fits, so the running requests' pages flow to it and it cannot
starve.

A request is admitted when its blocks, its adapter and the growth expected of all that run fit (`expected_lengths`). Pages come
from the free list, from cached blocks and from idle adapters (`scheduler.eviction`); a running request is never preempted for a
waiting one. Those next in order *claim* their adapters: no load evicts these again, and of places only those that go to
requests further ahead. A load only promises progress, a place is progress, so claims cannot block each other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from loraplex_engine.adapters.adapter import Room
from loraplex_engine.messages import ResidencyState
from loraplex_engine.pages.page_pool import PageOwner, PagePool
from loraplex_engine.scheduler.adapter_fetching import AdapterFetching, Outcome, Reservation
from loraplex_engine.scheduler.eviction_rule import EvictionRule
from loraplex_engine.scheduler.expected_lengths import ExpectedLengths, peak_growth
from loraplex_engine.scheduler.request import Request, RequestState
from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.limits import SchedulerLimits
    from loraplex_engine.pages.page_pool import Pages
    from loraplex_engine.scheduler.eviction import PageSource
    from loraplex_engine.scheduler.first_token_deadlines import FirstTokenDeadlines
    from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
    from loraplex_engine.scheduler.request_book import RequestBook
    from loraplex_engine.scheduler.running_batch import RunningBatch
    from loraplex_engine.scheduler.size_check import SizeCheck
    from loraplex_engine.scheduler.waiting_queue import WaitingQueue

MAX_LOOKAHEAD: Final = 16
"""Misfits that one pass looks behind; bounds the cost of a pass when thousands wait."""


class Admission:
    """Moves requests from the queue to the batch.

    Args:
        sharing: Finds blocks that others computed.
        eviction: Makes room.
        fetching: Brings adapters.
        reservation: For whom pages are kept.
        lengths: What requests drew lately.
        sizes: Refuses what can never fit.
        first_tokens: Ends whom a place would not help any more.
        book: Told of each request that got its slot.
    """

    def __init__(
        self,
        *,
        limits: SchedulerLimits,
        queue: WaitingQueue,
        batch: RunningBatch,
        pool: PagePool,
        cache: AdapterCache,
        sharing: PrefixSharing,
        eviction: PageSource,
        fetching: AdapterFetching,
        reservation: Reservation,
        lengths: ExpectedLengths,
        sizes: SizeCheck,
        first_tokens: FirstTokenDeadlines,
        book: RequestBook,
    ) -> None:
        self._limits = limits
        self._queue = queue
        self._batch = batch
        self._pool = pool
        self._cache = cache
        self._sharing = sharing
        self._eviction = eviction
        self._fetching = fetching
        self._reservation = reservation
        self._lengths = lengths
        self._sizes = sizes
        self._first_tokens = first_tokens
        self._book = book
        self._spared: set[str] = set()  # adapters claimed by requests that this pass has passed over
        self._seen: tuple[int, int, int, bool] | None = None  # what held at the last pass
        self._obtainable_seen = 0
        self._look_again_s = math.inf
        self._longest_blocks = 1 + -(-limits.max_model_len // limits.block_tokens)  # `peak_growth` rounds up by halves

    @property
    def reserving_digest(self) -> str | None:
        """Adapter of the request that pages are reserved for: not to be evicted for others' growth."""
        return self._reservation.request.adapter_digest if self._reservation.request else None

    @property
    def is_reserving(self) -> bool:
        """True while pages are kept for one request."""
        return self._reservation.request is not None

    @property
    def next_look_s(self) -> float:
        """When somebody who waits must be looked at although nothing has changed; infinity if nobody does."""
        if not len(self._queue):
            return math.inf
        return min(self._look_again_s, self._queue.next_promotion_s)

    def is_settled(self, now_s: float) -> bool:
        """Tell whether `admit` would change nothing now, and until something happens."""
        if self._reservation.request is not None or (self._cache.states.num_pinned and self._cache.states.pins_to_load):
            return False
        return not len(self._queue) or not (self._has_changed(now_s) or now_s >= self._queue.next_promotion_s)

    def arrive(self, request: Request, now_s: float) -> None:
        """Start to bring a new request's adapter from the store, if it has any and the arena lacks it."""
        digest = request.adapter_digest
        if digest is not None and self._cache.state_of(digest) is not ResidencyState.IN_ARENA:
            self._fetching.fetch(request, digest, now_s)

    def admit(self, now_s: float) -> None:
        """Admit whoever fits, and start the loads of adapters that the next ones need."""
        self._fetching.load_pinned()
        self._queue.promote(now_s)
        if self._reservation.request is not None and self._serve_reserving(self._reservation.request, now_s):
            return
        if not len(self._queue) or not self._has_changed(now_s):
            return
        try:
            self._pass(now_s)
        finally:
            self._queue.restore()
        self._remember()

    def _has_changed(self, now_s: float) -> bool:
        """Tell whether a pass could find anything that the last one did not."""
        more_room = self._eviction.num_obtainable > self._obtainable_seen
        return more_room or now_s >= self._look_again_s or self._seen != self._signature

    @property
    def _signature(self) -> tuple[int, int, int, bool]:
        return (self._queue.version, self._cache.states.sequence, self._batch.version, self._has_budget)

    def _remember(self) -> None:
        self._seen = self._signature
        self._obtainable_seen = self._eviction.num_obtainable

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
                    self._reservation.request = request
                    self._serve_reserving(request, now_s)
                    return
                self._look_again_s = min(self._look_again_s, now_s + self._limits.max_pass_over_s)
            self._queue.set_aside(request)
            if request.has_claim and request.adapter_digest is not None:
                self._spared.add(request.adapter_digest)

    @property
    def _is_idle(self) -> bool:
        """True if nothing under way could ever make room: whoever is first gets all of it, whatever others claim."""
        return len(self._batch) == 0 and self._cache.states.num_loading == 0

    def _is_overdue(self, request: Request, now_s: float) -> bool:
        if request.misfit_since_s is None:
            request.misfit_since_s = now_s
        return now_s - request.misfit_since_s > self._limits.max_pass_over_s

    def _serve_reserving(self, request: Request, now_s: float) -> bool:
        """Try the reserving request alone; False once it needs the reservation no more."""
        is_waiting = request.state is RequestState.WAITING
        if is_waiting and not request.is_parked:
            is_waiting = self._consider(request, now_s) is not Outcome.GONE or request.is_parked
        digest = request.adapter_digest
        if is_waiting and request.is_parked and digest is not None:
            # what the store has yet to send, pages cannot help
            is_waiting = self._cache.state_of(digest) is not ResidencyState.WANTED
        if not is_waiting:
            self._reservation.request = None
        return is_waiting

    def _consider(self, request: Request, now_s: float) -> Outcome:
        outcome = Outcome.GONE  # if looking at it fails it
        with self._book.answering_for(request, "while a place was sought for it"):
            outcome = self._look_at(request, now_s)
        return outcome

    def _look_at(self, request: Request, now_s: float) -> Outcome:
        digest = request.adapter_digest
        if digest is not None and self._cache.state_of(digest) is not ResidencyState.RESIDENT:
            return self._fetching.fetch(request, digest, now_s)
        if not self._batch.state.num_free or not self._has_budget:
            self._fetching.claim(request)
            return Outcome.NO_PLACE
        if self._sizes.refuse_if_too_large(request) or self._first_tokens.end_if_unreachable(request, now_s):
            return Outcome.GONE
        return self._seat(request)

    # --- places ---

    def _seat(self, request: Request) -> Outcome:
        found = self._sharing.find(request)
        self._pool.share(found)  # held first, lest making room evicts them
        try:
            outcome = self._make_place(request, found)
        except BaseException:
            self._pool.release(found, -1)
            raise
        if outcome is not Outcome.GONE:
            self._pool.release(found, -1)
            return outcome
        self._book.unclaim(request)
        self._queue.remove(request)
        request.move_to(RequestState.RUNNING)
        request.misfit_since_s = None
        self._queue.shares.run(request.share)
        self._book.start(request)
        return Outcome.GONE

    def _make_place(self, request: Request, found: Pages) -> Outcome:
        """Give a request slot, pages and lease if they can be had (GONE), behind the pages it found; if it raises, none."""
        num_tokens = min(request.num_known_tokens + 1, request.max_kv_tokens)
        num_pages = -(-num_tokens // self._limits.block_tokens) - len(found)
        spared = set() if request is self._reservation.request else set(self._spared)
        if request.adapter_digest is not None:
            spared.add(request.adapter_digest)
        room = Room.NO
        if self._fits(request, num_pages, len(found), spared):
            room = self._eviction.make_room(num_pages, EvictionRule(spared, spares_claimed=False))
        if room is not Room.NOW:
            return Outcome.SOON if room is Room.SOON else Outcome.NO_PAGES
        digest, stop_ids = request.adapter_digest, self._stop_ids_of(request)
        new = self._pool.allocate(num_pages, PageOwner.KV)
        adapter = NO_ADAPTER if digest is None else self._cache.lease(digest)
        try:
            self._batch.seat(request, adapter=adapter, found=found, new=new, stop_ids=stop_ids)
        except BaseException:
            self._pool.release(new, -1)
            if digest is not None:
                self._cache.release(digest, self._book.last_launched)
            raise
        return Outcome.GONE

    def _fits(self, request: Request, num_pages: int, num_found: int, spared: set[str]) -> bool:
        """Tell whether a request's pages and the growth expected of all that run can be had; alone it always fits."""
        if len(self._batch) == 0:
            return True
        left = self._eviction.num_obtainable_but(spared) - num_pages
        if left >= (len(self._batch) + 1) * self._longest_blocks:
            return True  # however much they draw
        if left < len(self._batch):
            return False
        growth = peak_growth(
            self._batch.state,
            self._batch.rows,
            expected=self._lengths.expected,
            num_known=request.num_known_tokens,
            num_more=self._num_more(request),
            num_blocks=num_pages + num_found,
        )
        return growth <= left

    def _num_more(self, request: Request) -> float:
        """Return how many tokens a request is expected to draw from now on."""
        is_open_ended = request.submission.stopping.max_new_tokens is None
        expected = self._lengths.of(request.max_outputs, is_open_ended=is_open_ended)
        num_drawn = len(request.output_token_ids)
        return min(request.max_outputs - num_drawn, max(0.0, expected - num_drawn))

    def _stop_ids_of(self, request: Request) -> tuple[int, ...]:
        stopping = request.submission.stopping
        return stopping.stop_token_ids + (() if stopping.ignore_eos else self._limits.eos_token_ids)
