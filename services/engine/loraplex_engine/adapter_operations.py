"""What operators may do to the adapters an engine holds; on the step loop's thread, between two steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import AdapterInUseError, AdapterNotFoundError, ConflictError, SaturatedError

from loraplex_engine.messages import ResidencyState

if TYPE_CHECKING:
    from loraplex_engine.adapter_cache import AdapterCache
    from loraplex_engine.page_pool import PagePool
    from loraplex_engine.residency import AdapterStatus

MAX_PINNED_SHARE: Final = 0.5
"""Of the pool's pages; the rest stays for sequences and other adapters."""


class AdapterOperations:
    """Pin, unpin and evict, with their conditions. Every method returns the adapter's status after it."""

    def __init__(self, *, cache: AdapterCache, pool: PagePool) -> None:
        self._cache = cache
        self._pool = pool

    def pin(self, digest: str) -> AdapterStatus:
        """Keep an adapter in the pool whatever the pressure.

        Raises:
            AdapterNotFoundError: If the engine does not hold it.
            SaturatedError: If pinned adapters would take more than `MAX_PINNED_SHARE` of the pool.
        """
        adapter, num_pinned = self._held(digest), self._cache.num_pinned_pages
        limit = math.floor(self._pool.num_pages * MAX_PINNED_SHARE)
        if not adapter.is_pinned and num_pinned + adapter.num_pages > limit:
            raise SaturatedError(
                f"pinning adapter {digest} needs {adapter.num_pages} pages, {num_pinned} are pinned and "
                f"{limit} of {self._pool.num_pages} may be",
                retry_after_s=60.0,
            )
        self._cache.set_pinned(digest, True)
        return self._cache.status(digest)

    def unpin(self, digest: str) -> AdapterStatus:
        """Make an adapter evictable again.

        Raises:
            AdapterNotFoundError: If the engine does not hold it.
        """
        self._held(digest)
        self._cache.set_pinned(digest, False)
        return self._cache.status(digest)

    def evict(self, digest: str, require_generation: int | None = None) -> AdapterStatus:
        """Let an adapter go from the device, at once or when its last lease is returned; the arena keeps its copy.

        Raises:
            AdapterNotFoundError: If the engine does not hold it.
            ConflictError: If it is of another generation.
            AdapterInUseError: If it is pinned.
        """
        adapter = self._held(digest)
        if require_generation is not None and require_generation != adapter.generation:
            raise ConflictError(f"adapter {digest} is of generation {adapter.generation}, not {require_generation}")
        if adapter.is_pinned:
            raise AdapterInUseError(f"adapter {digest} is pinned: unpin it first")
        self._cache.drain(digest)
        return self._cache.status(digest)

    def _held(self, digest: str) -> AdapterStatus:
        status = self._cache.status(digest)
        if status.state in (ResidencyState.ABSENT, ResidencyState.WANTED, ResidencyState.DRAINING):
            raise AdapterNotFoundError(f"this engine does not hold adapter {digest}")
        return status
