"""Loads likely adapters before anybody asks, where that costs nobody anything.

At most one at a time, while the copy stream has nothing else to do. Free pages are taken for it as they are, others only
from what is worth less than half; whatever was warmed is idle, so it goes the moment a sequence needs the room and it is
what is worth least.
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
"""What gives way for a warmed adapter is worth less than half of it, so two of about equal worth do not take turns."""


class Warming:
    """Chooses what to load next for nobody in particular.

    Args:
        is_enabled: False loads nothing.
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
        """True if `warm` would do nothing until something happens."""
        return not self._is_enabled or self._cache.states.num_loading > 0 or self._seen == self._signature

    def warm(self) -> None:
        """Start one load if it is worth it; costs nothing while nothing changes."""
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
    """No adapter gives way for a place in the table."""
    return False
