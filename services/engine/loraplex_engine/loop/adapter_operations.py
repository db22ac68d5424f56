"""What operators may do to the adapters that an engine holds; runs on the step loop's thread, between two steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterInUseError, AdapterNotFoundError, ConflictError, SaturatedError

from loraplex_engine.messages import ResidencyState

if TYPE_CHECKING:
    from loraplex_engine.adapters.adapter import AdapterStatus
    from loraplex_engine.adapters.cache import AdapterCache
    from loraplex_engine.pages.page_pool import PagePool

MAX_PINNED_SHARE: Final = 0.5
"""Largest share of the pool's pages, and of the runner's table, for pinned adapters; the rest stays for others."""


class AdapterOperations:
    """Pins, unpins and evicts adapters, under conditions. Every method returns the adapter's status afterwards."""

    def __init__(self, *, cache: AdapterCache, pool: PagePool) -> None:
        self._cache = cache
        self._pool = pool

    def pin(self, digest: str) -> AdapterStatus:
        """Keep an adapter in the pool whatever the pressure.

        Raises:
            AdapterNotFoundError: If the engine does not hold the adapter.
            SaturatedError: If pinned adapters would take more than `MAX_PINNED_SHARE` of the pool or the table.
        """
        adapter = self._held(digest)
        if not adapter.is_pinned:
            self._check_share(
                digest, "pages", adapter.num_pages, self._cache.states.num_pinned_pages, self._pool.num_pages
            )
            self._check_share(digest, "places", 1, self._cache.states.num_pinned, self._cache.loads.max_resident)
        self._cache.states.set_pinned(digest, True)
        return self._cache.states.status(digest)

    @staticmethod
    def _check_share(digest: str, what: str, needed: int, pinned: int, total: int) -> None:
        limit = math.floor(total * MAX_PINNED_SHARE)
        if pinned + needed > limit:
            raise SaturatedError(
                f"pinning adapter {digest} needs {needed} {what}, {pinned} are pinned and {limit} of {total} may be",
                retry_after_s=60.0,
            )

    def unpin(self, digest: str) -> AdapterStatus:
        """Make an adapter evictable again.

        Raises:
            AdapterNotFoundError: If the engine does not hold the adapter.
        """
        self._held(digest)
        self._cache.states.set_pinned(digest, False)
        return self._cache.states.status(digest)

    def evict(self, digest: str, require_generation: int | None = None) -> AdapterStatus:
        """Take an adapter off the device, at once or when its last lease is returned; the arena keeps its copy.

        Raises:
            AdapterNotFoundError: If the engine does not hold the adapter.
            ConflictError: If the adapter's generation is another.
            AdapterInUseError: If the adapter is pinned.
        """
        adapter = self._held(digest)
        if require_generation is not None and require_generation != adapter.generation:
            raise ConflictError(f"adapter {digest} is of generation {adapter.generation}, not {require_generation}")
        if adapter.is_pinned:
            raise AdapterInUseError(f"adapter {digest} is pinned: unpin it first")
        self._cache.drain(digest)
        return self._cache.states.status(digest)

    def _held(self, digest: str) -> AdapterStatus:
        status = self._cache.states.status(digest)
        if status.state in (ResidencyState.ABSENT, ResidencyState.WANTED, ResidencyState.DRAINING):
            raise AdapterNotFoundError(f"this engine does not hold adapter {digest}")
        return status
