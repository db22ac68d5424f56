"""Which idle adapters may go for somebody."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from loraplex_engine.adapters.adapter import Adapter
    from loraplex_engine.scheduler.waiting_queue import WaitingQueue


class EvictionRule:
    """Which idle adapters may go for somebody.

    Args:
        spared: Digests that do not go.
        spares_claimed: Adapters that waiting requests claim do not go.
        queue: If given, no adapter that a request waits with goes.
    """

    def __init__(self, spared: AbstractSet[str], *, spares_claimed: bool, queue: WaitingQueue | None = None) -> None:
        self._spared = spared
        self._spares_claimed = spares_claimed
        self._queue = queue

    def __call__(self, adapter: Adapter) -> bool:
        """Tell whether an adapter may go."""
        if adapter.digest in self._spared or (self._spares_claimed and adapter.num_claims):
            return False
        return self._queue is None or not self._queue.is_awaited(adapter.digest)
