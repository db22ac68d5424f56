"""Tells which idle adapters may be evicted for a request, a load or a growing sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from loraplex_engine.adapters.adapter import Adapter
    from loraplex_engine.scheduler.waiting_queue import WaitingQueue


class EvictionRule:
    """Tells which idle adapters may be evicted.

    Args:
        spared: Digests of adapters that may not be evicted.
        spares_claimed: True if adapters that waiting requests claim may not be evicted either.
        queue: If given, an adapter that any request waits with may not be evicted.
    """

    def __init__(self, spared: AbstractSet[str], *, spares_claimed: bool, queue: WaitingQueue | None = None) -> None:
        self._spared = spared
        self._spares_claimed = spares_claimed
        self._queue = queue

    def __call__(self, adapter: Adapter) -> bool:
        """Tell whether an adapter may be evicted."""
        if adapter.digest in self._spared or (self._spares_claimed and adapter.num_claims):
            return False
        return self._queue is None or not self._queue.is_awaited(adapter.digest)
