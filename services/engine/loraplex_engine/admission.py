"""Who gets the next place in a batch, and whose adapter is loaded for it.

In order of `Request.queue_key`, passing over those that wait for their adapter or for more room than there is: no
misfit blocks the others. Who is passed over for lack of pages for longer than a bound *reserves* them: nobody is
admitted and no adapter loaded until it fits, so the running requests' pages flow to it and it cannot starve.

Pages for a request come from the free list and from idle adapters whose waiting requests all come later; a running
request is never preempted for a waiting one.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import LoraplexError, RequestTooLargeError

from loraplex_engine.messages import ResidencyState
from loraplex_engine.page_pool import PageOwner, PagePool
from loraplex_engine.request import Request, RequestState
from loraplex_engine.residency import Room
from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.adapter_cache import AdapterCache
    from loraplex_engine.running_batch import RunningBatch
    from loraplex_engine.waiting_queue import WaitingQueue

MAX_LOOKAHEAD: Final = 16
"""Misfits that one pass looks behind; bounds the cost of a pass when thousands wait."""

_ON_THE_WAY: Final = (ResidencyState.WANTED, ResidencyState.LOADING, ResidencyState.DRAINING)


class _Outcome(enum.Enum):
    """What became of an eligible request."""

    GONE = "gone"  # admitted, parked or ended: no longer eligible
    NO_PLACE = "no_place"  # no slot or no token budget
    NO_PAGES = "no_pages"
    SOON = "soon"  # pages come when steps in flight are done


class Admission:
    """Moves requests from the queue to the batch.

    Args:
        eos_token_ids: The model's end-of-text ids.
        max_num_batched_tokens: No more prefill work is admitted than one step can do.
        max_pass_over_s: How long others may take pages before a request that lacks them.
        on_admitted: Called with each request that got its slot.
        on_refused: Called with each request that turned out never to fit; it ends the request.
    """

    def __init__(
        self,
        *,
        queue: WaitingQueue,
        batch: RunningBatch,
        pool: PagePool,
        cache: AdapterCache,
        eos_token_ids: tuple[int, ...],
        max_num_batched_tokens: int,
        max_pass_over_s: float,
        on_admitted: Callable[[Request], None],
        on_refused: Callable[[Request, LoraplexError], None],
    ) -> None:
        self._queue = queue
        self._batch = batch
        self._pool = pool
        self._cache = cache
        self._eos_token_ids = eos_token_ids
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_pass_over_s = max_pass_over_s
        self._on_admitted = on_admitted
        self._on_refused = on_refused
        self._reserving: Request | None = None
        self._block_tokens = batch.state.block_tokens

    @property
    def reserving_digest(self) -> str | None:
        """Adapter of the request that pages are reserved for: not to be evicted for others' growth."""
        return self._reserving.adapter_digest if self._reserving else None

    def arrive(self, request: Request, now_s: float) -> None:
        """Start to bring a new request's adapter, if it has any; pages that somebody reserves are not touched."""
        digest = request.adapter_digest
        if digest is None or (self._reserving and self._cache.state_of(digest) is ResidencyState.IN_ARENA):
            return
        self._bring(request, now_s)

    def admit(self, now_s: float) -> None:
        """Admit whoever fits, and start the loads of adapters that the next ones need."""
        self._load_pinned()
        if self._reserving is not None and self._serve_reserving(self._reserving, now_s):
            return
        index = 0
        while index < min(MAX_LOOKAHEAD, len(self._queue.eligible)):
            request = self._queue.eligible[index]
            outcome = self._consider(request, now_s)
            if outcome is _Outcome.GONE:
                continue
            index += 1
            if outcome is _Outcome.SOON:
                return
            if outcome is _Outcome.NO_PAGES and self._is_overdue(request, now_s):
                self._reserving = request
                return

    def _is_overdue(self, request: Request, now_s: float) -> bool:
        if request.misfit_since_s is None:
            request.misfit_since_s = now_s
        return now_s - request.misfit_since_s > self._max_pass_over_s

    def _serve_reserving(self, request: Request, now_s: float) -> bool:
        """Try the reserving request alone; False once it needs the reservation no more."""
        is_waiting = request.state is RequestState.WAITING
        if is_waiting and not request.is_parked:
            is_waiting = self._consider(request, now_s) is not _Outcome.GONE or request.is_parked
        digest = request.adapter_digest
        if is_waiting and request.is_parked and digest is not None:
            # what the store has yet to send, pages cannot help
            is_waiting = self._cache.state_of(digest) is not ResidencyState.WANTED
        if not is_waiting:
            self._reserving = None
        return is_waiting

    def _consider(self, request: Request, now_s: float) -> _Outcome:
        digest = request.adapter_digest
        if digest is not None and self._cache.state_of(digest) is not ResidencyState.RESIDENT:
            return self._bring(request, now_s)
        if not self._batch.state.num_free or self._batch.num_prefill_tokens >= self._max_num_batched_tokens:
            return _Outcome.NO_PLACE
        return _Outcome.GONE if self.refuse_if_too_large(request) else self._seat(request)

    def _bring(self, request: Request, now_s: float) -> _Outcome:
        """Bring a request's adapter a state nearer to residency, and park the request if that takes time."""
        digest = request.adapter_digest
        if digest is None:
            raise RuntimeError(f"request {request.submission.request_id} has no adapter to bring")
        state = self._cache.state_of(digest)
        if state is ResidencyState.RESIDENT:
            return _Outcome.NO_PLACE
        if state is ResidencyState.ABSENT:
            self._cache.want(digest, request.submission.deadline_s)
        elif state is ResidencyState.IN_ARENA:
            if self.refuse_if_too_large(request):
                return _Outcome.GONE
            num_pages = self._cache.num_pages_of(digest) or 0
            if not self._leaves_headroom(request, num_pages):
                return _Outcome.NO_PAGES
            room = self._cache.load(digest, self._may_evict_for(request))
            if room is not Room.NOW:
                return _Outcome.SOON if room is Room.SOON else _Outcome.NO_PAGES
        elif state not in _ON_THE_WAY:
            raise RuntimeError(f"adapter {digest} is {state}")
        self._queue.park(request, now_s)
        return _Outcome.GONE

    def _seat(self, request: Request) -> _Outcome:
        num_tokens = min(request.num_known_tokens + 1, request.max_kv_tokens)
        num_pages = self._pages_for(num_tokens)
        if not self._leaves_headroom(request, num_pages):
            return _Outcome.NO_PAGES
        room = self._cache.reclaim(num_pages, self._may_evict_for(request))
        if room is not Room.NOW:
            return _Outcome.SOON if room is Room.SOON else _Outcome.NO_PAGES
        digest = request.adapter_digest
        adapter = NO_ADAPTER if digest is None else self._cache.lease(digest)
        self._queue.remove(request)
        request.move_to(RequestState.RUNNING)
        request.misfit_since_s = None
        pages = self._pool.allocate(num_pages, PageOwner.KV)
        self._batch.seat(request, adapter=adapter, pages=pages, stop_ids=self._stop_ids_of(request))
        self._on_admitted(request)
        return _Outcome.GONE

    def _stop_ids_of(self, request: Request) -> tuple[int, ...]:
        stopping = request.submission.stopping
        return stopping.stop_token_ids + (() if stopping.ignore_eos else self._eos_token_ids)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _leaves_headroom(self, request: Request, num_pages: int) -> bool:
        """Tell whether each running request could still get one more block, so that none is preempted at once."""
        own = request.adapter_digest
        idle = self._cache.num_idle_pages - (self._cache.num_idle_pages_of(own) if own else 0)
        left = self._pool.num_free + self._pool.num_retiring + idle - num_pages
        return len(self._batch) == 0 or left >= len(self._batch)

    def _may_evict_for(self, request: Request) -> Callable[[str], bool]:
        """Return which idle adapters may go for a request: those that nobody before it waits with."""

        def may_evict(digest: str) -> bool:
            if digest == request.adapter_digest:
                return False
            first = self._queue.first_of(digest)
            return first is None or request is self._reserving or request.queue_key < first.queue_key

        return may_evict

    def _load_pinned(self) -> None:
        if self._reserving is None:
            for digest in self._cache.pins_to_load:
                self._cache.load(digest, lambda other: self._queue.first_of(other) is None)

    def load_unattended(self, digest: str) -> None:
        """Load an adapter that was wanted although nobody waits with it (FAIL_FAST), if idle room allows."""
        if self._reserving is None and self._pool.num_free + self._cache.num_idle_pages > len(self._batch):
            self._cache.load(digest, lambda other: self._queue.first_of(other) is None)

    def refuse_if_too_large(self, request: Request) -> bool:
        """End a request that cannot fit even alone; an open-ended one is cut to what fits instead."""
        digest = request.adapter_digest
        adapter_pages = (self._cache.num_pages_of(digest) or 0) if digest else 0
        pinned = self._cache.num_pinned_pages
        if digest is not None and self._cache.is_pinned(digest):
            pinned -= adapter_pages
        room = self._pool.num_pages - adapter_pages - pinned
        if request.submission.stopping.max_new_tokens is None:
            most = room * self._block_tokens + 1 - request.num_prompt_tokens
            request.max_outputs = min(request.max_outputs, max(most, len(request.output_token_ids) + 1))
        needed = self._pages_for(request.max_kv_tokens)
        if needed <= room:
            return False
        error = RequestTooLargeError(
            f"{request.num_prompt_tokens} prompt and {request.max_outputs} output tokens need {needed} pages of "
            f"{self._block_tokens} tokens, the adapter {adapter_pages} pages; the pool has {self._pool.num_pages}, "
            f"{pinned} of them pinned by other adapters",
            metadata={
                "kv_pages": str(needed),
                "adapter_pages": str(adapter_pages),
                "pool_pages": str(self._pool.num_pages),
            },
        )
        self._on_refused(request, error)
        return True
