"""Loads likely adapters before any request asks for them, where that delays no request.

At most one such load runs at a time, and only while the copy stream has nothing else to do. It takes free pages as they
are, and evicts only what is worth less than half of the adapter. A warmed adapter is idle, so it is evicted as soon as
a sequence needs the room and the adapter is worth least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_engine.adapters.adapter import Room
from loraplex_engine.scheduler.eviction_rule import EvictionRule

if TYPE_CHECKING:
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.scheduler.eviction import PageSource
    from loraplex_engine.scheduler.request_book import RequestBook

MARGIN_OCTAVES: Final = 1.0
"""What a warmed adapter evicts is worth less than half of it, so two of about equal worth do not take turns."""


class Warming:
    """Chooses the next adapter to load although no request waits with it.

    Args:
        is_enabled: False if nothing is loaded ahead.
    """

    def __init__(self, *, book: RequestBook, cache: AdapterCache, source: PageSource, is_enabled: bool) -> None:
        self._batch = book.batch
        self._queue = book.queue
        self._cache = cache
        self._source = source
        self._is_enabled = is_enabled
        self._seen: tuple[int, int, int, int] | None = None

    @property
    def _signature(self) -> tuple[int, int, int, int]:
        cache = self._cache
        return (cache.states.sequence, cache.ranking.warmable_version, self._batch.version, self._queue.version)

    @property
    def is_settled(self) -> bool:
        """True if `warm` would do nothing until something changes."""
        return not self._is_enabled or self._cache.states.num_loading > 0 or self._seen == self._signature

    def warm(self) -> None:
        """Start one load if it is worth its cost; takes no time while nothing changes."""
        if self.is_settled:
            return
        self._seen = self._signature
        best = self._cache.ranking.most_warmable
        if best is None or self._queue.is_awaited(best.digest):
            return
        if self._source.num_obtainable - best.num_pages < len(self._batch):
            return
        rule = EvictionRule({best.digest}, spares_claimed=True, queue=self._queue)
        if self._source.make_room(best.num_pages, rule, up_to=best.worth - MARGIN_OCTAVES) is Room.NOW:
            self._cache.load(best.digest, _nobody, is_warming=True)


def _nobody(_adapter: object) -> bool:
    """Refuse every adapter: none is evicted for a place in the adapter table."""
    return False
