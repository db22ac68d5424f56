"""What a request gets with its place in the batch: blocks computed by others, new pages, leases of its adapters, a slot.

A request fits when there is room for its blocks, its adapter and the growth expected of all running requests
(`expected_lengths`). Pages come from the free list, from cached blocks and from idle adapters (`eviction`); a running
request is never preempted for a waiting one.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from loraplex_engine.adapters.adapter import Room
from loraplex_engine.pages.page_pool import PageOwner, PagePool
from loraplex_engine.scheduler.eviction_rule import EvictionRule
from loraplex_engine.scheduler.expected_lengths import peak_growth
from loraplex_engine.scheduler.request import Request, RequestState

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.limits import EngineLimits
    from loraplex_engine.pages.page_pool import Pages
    from loraplex_engine.scheduler.eviction import PageSource
    from loraplex_engine.scheduler.prefix_sharing import PrefixSharing
    from loraplex_engine.scheduler.request_book import RequestBook


class Outcome(enum.Enum):
    """What became of an eligible request."""

    GONE = "gone"  # admitted, parked or ended: no longer eligible
    NO_PLACE = "no_place"  # no slot or no token budget
    NO_PAGES = "no_pages"
    SOON = "soon"  # pages come when steps in flight are done


class Placement:
    """Moves one request from the queue to the batch, with everything it needs or with nothing.

    Args:
        book: Is told of each request that got its slot.
        source: Makes room for KV.
        sharing: Finds blocks that other requests computed.
    """

    def __init__(
        self,
        *,
        limits: EngineLimits,
        book: RequestBook,
        pool: PagePool,
        cache: AdapterCache,
        source: PageSource,
        sharing: PrefixSharing,
    ) -> None:
        self._limits = limits
        self._book = book
        self._batch = book.batch
        self._pool = pool
        self._cache = cache
        self._source = source
        self._sharing = sharing
        self._longest_blocks = 1 + -(-limits.max_model_len // limits.block_tokens)  # `peak_growth` rounds up by halves

    @property
    def num_obtainable(self) -> int:
        """Pages free now or soon, or freed by evicting blocks and adapters that no request claims."""
        return self._source.num_obtainable

    def seat(self, request: Request, spared: set[str]) -> Outcome:
        """Give a waiting request its place; GONE if it has its place now.

        Args:
            request: The request; its adapters are resident.
            spared: Digests of adapters that must not be evicted for it.
        """
        found = self._sharing.find(request)
        others_page_s = self._pool.share(found)  # held first, so that making room does not evict them
        try:
            outcome = self._make_place(request, found, spared)
        except BaseException:
            self._pool.release(found, -1)
            raise
        if outcome is not Outcome.GONE:
            self._pool.release(found, -1)
            return outcome
        self._book.unclaim(request)
        self._book.queue.remove(request)
        request.move_to(RequestState.RUNNING)
        request.misfit_since_s = None
        request.kv_page_s -= others_page_s
        self._book.queue.shares.run(request.share)
        self._book.start(request)
        return Outcome.GONE

    def _make_place(self, request: Request, found: Pages, spared: set[str]) -> Outcome:
        """Give a request slot, pages and leases (GONE), or none of them if they cannot be had or if it raises.

        Positions of the request's tokens, in blocks:

                [0, len(found))                          computed by others, in shared pages
                [len(found), len(found) + num_pages)     new pages: its known tokens and the first token drawn
        """
        num_tokens = min(request.num_known_tokens + 1, request.max_kv_tokens)
        num_pages = -(-num_tokens // self._limits.block_tokens) - len(found)
        spared.update(request.digests)
        room = Room.NO
        if self._fits(request, num_pages, len(found), spared):
            room = self._source.make_room(num_pages, EvictionRule(spared, spares_claimed=False))
        if room is not Room.NOW:
            return Outcome.SOON if room is Room.SOON else Outcome.NO_PAGES
        stop_ids = self._stop_ids_of(request)
        new = self._pool.allocate(num_pages, PageOwner.KV)
        leased: list[str] = []
        try:
            adapters = [self._lease(digest, leased) for digest in request.digests]
            self._batch.seat(request, adapters=adapters, found=found, new=new, stop_ids=stop_ids)
        except BaseException:
            self._pool.release(new, -1)
            for digest in leased:
                self._cache.release(digest, self._book.last_launched)
            raise
        return Outcome.GONE

    def _lease(self, digest: str, leased: list[str]) -> int:
        index = self._cache.lease(digest)
        leased.append(digest)
        return index

    def _fits(self, request: Request, num_pages: int, num_found: int, spared: set[str]) -> bool:
        """Tell whether a request's pages and the growth expected of all running requests fit; alone, it always fits."""
        if len(self._batch) == 0:
            return True
        left = self._source.num_obtainable_but(spared) - num_pages
        if left >= (len(self._batch) + 1) * self._longest_blocks:
            return True  # it fits however many tokens they draw
        if left < len(self._batch):
            return False
        growth = peak_growth(
            self._batch.state,
            self._batch.rows,
            expected=self._book.lengths.expected,
            num_known=request.num_known_tokens,
            num_more=self._num_more(request),
            num_blocks=num_pages + num_found,
        )
        return growth <= left

    def _num_more(self, request: Request) -> float:
        """Return how many tokens a request is expected to draw from now on."""
        is_open_ended = request.submission.stopping.max_new_tokens is None
        expected = self._book.lengths.of(request.max_outputs, is_open_ended=is_open_ended)
        num_drawn = len(request.output_token_ids)
        return min(request.max_outputs - num_drawn, max(0.0, expected - num_drawn))

    def _stop_ids_of(self, request: Request) -> tuple[int, ...]:
        stopping = request.submission.stopping
        return stopping.stop_token_ids + (() if stopping.ignore_eos else self._limits.eos_token_ids)
