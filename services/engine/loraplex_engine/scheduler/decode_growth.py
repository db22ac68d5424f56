"""Gives each row at the end of its last block another page, and decides which pages are freed for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.adapters.adapter import Room
from loraplex_engine.messages import ResidencyState
from loraplex_engine.pages.page_pool import PageOwner, PagePool
from loraplex_engine.scheduler.eviction_rule import EvictionRule

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.scheduler.admission import Admission
    from loraplex_engine.scheduler.decode_state import Rows
    from loraplex_engine.scheduler.eviction import PageSource
    from loraplex_engine.scheduler.request import Request
    from loraplex_engine.scheduler.request_book import RequestBook


class DecodeGrowth:
    """Grows the running rows, and preempts the requests admitted last if nothing else frees enough pages."""

    def __init__(
        self, *, book: RequestBook, pool: PagePool, cache: AdapterCache, source: PageSource, admission: Admission
    ) -> None:
        self._book = book
        self._batch = book.batch
        self._pool = pool
        self._cache = cache
        self._source = source
        self._admission = admission

    def grow(self, rows: Rows) -> Rows:
        """Give rows at the end of their last block another page; returns the rows that can run now.

        Cached blocks and idle adapters are evicted first, unclaimed adapters before claimed ones. If that is not
        enough, the requests admitted last are preempted. If pages come only when steps in flight are done, the latest
        rows skip this step.
        """
        state = self._batch.state
        growing = rows[state.needs_block(rows)]
        while len(growing) > self._source.num_free:
            room = self._make_room(len(growing))
            if room is Room.NO:
                self._book.preempt(self._victim())
                rows = state.rows_to_decode(self._batch.rows)
                growing = rows[state.needs_block(rows)]
            elif room is Room.SOON:
                growing, stalled = np.split(growing, [self._source.num_free])
                rows = rows[~np.isin(rows, stalled)]
        if len(growing):
            state.append_blocks(growing, self._pool.allocate(len(growing), PageOwner.KV))
        return rows

    @property
    def watermark(self) -> int:
        """Pages to have free beyond the present need: what the batch takes in a few steps."""
        return 1 + 4 * len(self._batch) // self._batch.state.block_tokens

    def _make_room(self, num_pages: int) -> Room:
        """Make pages free, a few ahead of need if that takes nothing from a waiting request."""
        spared = set(self._admission.reserving_digests)
        spare = EvictionRule(spared, spares_claimed=True)
        room = self._source.make_room(num_pages + self.watermark, spare)
        if room is Room.NO:
            room = self._source.make_room(num_pages, spare)
        if room is Room.NO:
            room = self._source.make_room(num_pages, EvictionRule(spared, spares_claimed=False))
        return Room.NOW if num_pages <= self._source.num_free else room

    def _victim(self) -> Request:
        """Return the request admitted last, except one whose adapter drains: a drained adapter might not come again."""
        requests = self._batch.requests
        for request in reversed(requests):
            if all(self._cache.state_of(digest) is not ResidencyState.DRAINING for digest in request.digests):
                return request
        return requests[-1]
