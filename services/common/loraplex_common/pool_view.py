"""An engine's page pool as a watcher knows it: takes changes in, and returns all of it to later watchers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex.v1 import engine_pb2
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

PageCells = NDArray[np.int64]
"""``[num_pages]``: the owner of each page, times 2**32, plus its holder."""
OWNER_NAMES: Final = {
    engine_pb2.PAGE_OWNER_UNSPECIFIED: "free",
    engine_pb2.PAGE_OWNER_KV: "kv",
    engine_pb2.PAGE_OWNER_ADAPTER: "adapter",
    engine_pb2.PAGE_OWNER_RETIRING: "retiring",
    engine_pb2.PAGE_OWNER_CACHED: "cached",
}
_HOLDER_BITS: Final = 32
_HOLDERS: Final = (1 << _HOLDER_BITS) - 1


def page_cells(owners: NDArray[np.int8], holders: NDArray[np.int64]) -> PageCells:
    """Return owner (``[num_pages]``, as in engine.proto PageOwner) and holder (``[num_pages]``) of each page as one number."""
    return (owners.astype(np.int64) << _HOLDER_BITS) | holders


def put_runs(change: engine_pb2.PoolChange, cells: PageCells, before: PageCells) -> None:
    """Write the pages that have changed between two readings, both ``[num_pages]``, as runs into a message."""
    changed = np.flatnonzero(cells != before)
    if not len(changed):
        return
    values = cells[changed]
    begins = np.flatnonzero((np.diff(changed) != 1) | (np.diff(values) != 0)) + 1
    firsts = np.concatenate([[0], begins])
    change.run_starts.extend(changed[firsts].tolist())
    change.run_lengths.extend(np.diff(np.append(firsts, len(changed))).tolist())
    change.run_owners.extend((values[firsts] >> _HOLDER_BITS).tolist())
    change.run_holders.extend((values[firsts] & _HOLDERS).tolist())


class PoolView:
    """One engine's pool, by the changes so far.

    Args:
        clock: Seconds, monotonic: how often adapters are asked for fades between two messages.

    Attributes:
        requests: Open requests by holder.
        adapters: Adapters on the device by holder.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cells: PageCells = np.zeros(0, dtype=np.int64)
        self._told_at: dict[int, float] = {}
        self._left_out = (0, 0)
        self.requests: dict[int, engine_pb2.PoolRequest] = {}
        self.adapters: dict[int, engine_pb2.PoolAdapter] = {}

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return len(self._cells)

    @property
    def owners(self) -> NDArray[np.int64]:
        """Owner of each page, ``[num_pages]``, as in engine.proto PageOwner."""
        return self._cells >> _HOLDER_BITS

    @property
    def holders(self) -> NDArray[np.int64]:
        """Holder of each page, ``[num_pages]``; 0 where there is none."""
        return self._cells & _HOLDERS

    def num_pages_by_owner(self) -> dict[str, int]:
        """Return the pages of each owner, e.g. ``kv``; the free ones are ``free``."""
        counts = np.bincount(self.owners, minlength=len(OWNER_NAMES))
        return {name: int(counts[owner]) for owner, name in OWNER_NAMES.items()}

    def requests_per_s(self, holder: int) -> float:
        """Return how often an adapter on the device is asked for, faded up to now."""
        adapter = self.adapters[holder]
        half_life_s = adapter.half_life.seconds + adapter.half_life.nanos * 1e-9
        age_s = self._clock() - self._told_at[holder]
        return adapter.requests_per_s * 2.0 ** (-age_s / half_life_s) if half_life_s > 0 else adapter.requests_per_s

    def apply(self, change: engine_pb2.PoolChange) -> None:
        """Take a change in.

        Raises:
            ValueError: If it is about pages that the pool does not have.
        """
        if change.snapshot:
            self._cells = np.zeros(change.num_pages, dtype=np.int64)
            self._told_at.clear()
            self.requests.clear()
            self.adapters.clear()
        runs = zip(change.run_starts, change.run_lengths, change.run_owners, change.run_holders, strict=True)
        for start, length, owner, holder in runs:
            if start + length > len(self._cells):
                raise ValueError(f"pages {start} to {start + length} of a pool of {len(self._cells)}")
            self._cells[start : start + length] = (owner << _HOLDER_BITS) | holder
        self._apply_requests(change)
        for holder in change.gone_adapters:
            self.adapters.pop(holder, None)
            self._told_at.pop(holder, None)
        for adapter in change.adapters:
            self.adapters[adapter.holder] = adapter
            self._told_at[adapter.holder] = self._clock()
        self._left_out = (change.requests_left_out, change.adapters_left_out)

    def _apply_requests(self, change: engine_pb2.PoolChange) -> None:
        for holder in change.ended_requests:
            self.requests.pop(holder, None)
        for request in change.requests:
            self.requests[request.holder] = kept = engine_pb2.PoolRequest()
            kept.CopyFrom(request)
        progress = zip(
            change.progress_holders,
            change.progress_computed,
            change.progress_outputs,
            change.progress_pages,
            strict=True,
        )
        for holder, computed, outputs, pages in progress:
            if (known := self.requests.get(holder)) is not None:
                known.computed_tokens, known.output_tokens, known.num_pages = computed, outputs, pages

    def snapshot(self) -> engine_pb2.PoolChange:
        """Return all that is known, as one change."""
        change = engine_pb2.PoolChange(snapshot=True, num_pages=self.num_pages)
        change.requests_left_out, change.adapters_left_out = self._left_out
        put_runs(change, self._cells, np.zeros_like(self._cells))
        change.requests.extend(self.requests.values())
        change.adapters.extend(self.adapters.values())
        for adapter in change.adapters:
            adapter.requests_per_s = self.requests_per_s(adapter.holder)
        return change
