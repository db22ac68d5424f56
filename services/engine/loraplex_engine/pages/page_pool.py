"""The accounts of the unified page pool: which page is free, which owner has it, and when it may be reused.

Only page ids are kept here; the runner owns the memory. A page whose owner releases it while steps that read it are
still on the device is *retiring*: it becomes free when the last such step is done.

A KV page may be held by several sequences at once, each of which only reads it. Such a page is *published*: its block
is full and an entry of the prefix cache names it. Published pages that no sequence holds are *cached*: no sequence
needs them now, and they are evicted when one needs the room.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from loraplex_engine.pages.page_seconds import Integral, PageClocks

if TYPE_CHECKING:
    from collections.abc import Callable

Pages = NDArray[np.intp]
"""Page ids as numpy indexes with them; int32 costs a conversion each time."""
NO_PAGES: Final[Pages] = np.empty(0, dtype=np.intp)


class PageOwner(enum.IntEnum):
    """What a page is used for."""

    FREE = 0
    KV = 1
    ADAPTER = 2
    RETIRING = 3
    CACHED = 4


# As plain integers: numpy asks an IntEnum for array interfaces each time, at microseconds.
_FREE, _KV, _ADAPTER, _RETIRING, _CACHED = (int(owner) for owner in PageOwner)
_HOLDERS: Final = (_KV, _ADAPTER)


class PagePool:
    """Hands out page ids from one free list, for KV blocks and adapters alike.

    Invariant: free + retiring + kv + cached + adapter = total; `check_integrity` recounts it.

    Args:
        clock: Seconds, monotonic.

    Attributes:
        num_revived: Cached pages that sequences took up again so far.
        page_seconds: Integrals over time of the pages that sequences hold (KV), adapters hold, and that are CACHED.
    """

    def __init__(self, num_pages: int, clock: Callable[[], float] = time.monotonic) -> None:
        if num_pages <= 0:
            raise ValueError(f"num_pages {num_pages} is not positive")
        self._owners = np.full(num_pages, _FREE, dtype=np.int8)
        self._free = np.arange(num_pages - 1, -1, -1)  # a stack: [0, num_free) are free, the rest is stale
        self._num_free = num_pages
        self._num_held = [0] * len(PageOwner)  # by owner; only KV, ADAPTER and CACHED are counted
        self._num_sequences = np.zeros(num_pages, dtype=np.int32)  # how many sequences hold each KV page
        self._is_published = np.zeros(num_pages, dtype=np.bool_)
        self._last_steps = np.full(num_pages, -1, dtype=np.int64)  # last step that may read each CACHED page
        self._retiring: deque[tuple[int, Pages]] = deque()  # by rising step id
        self._num_retiring = 0
        self._completed_step = -1
        self.num_revived = 0
        self._clocks = PageClocks(num_pages, clock)
        self.page_seconds = {owner: Integral(clock) for owner in (PageOwner.KV, PageOwner.ADAPTER, PageOwner.CACHED)}

    @property
    def num_pages(self) -> int:
        """All pages of the pool."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return self._num_free

    @property
    def num_retiring(self) -> int:
        """Pages that become free when steps in flight are done."""
        return self._num_retiring

    @property
    def num_kv(self) -> int:
        """Pages that sequences hold."""
        return self._num_held[_KV]

    @property
    def num_adapter(self) -> int:
        """Pages that adapters hold."""
        return self._num_held[_ADAPTER]

    @property
    def num_cached(self) -> int:
        """Pages with a block that no sequence holds now; `evict` frees them."""
        return self._num_held[_CACHED]

    @property
    def cached_pages(self) -> Pages:
        """All CACHED pages, rising."""
        return np.flatnonzero(self._owners == _CACHED)

    @property
    def published_pages(self) -> Pages:
        """All published pages, held or cached, rising."""
        return np.flatnonzero(self._is_published)

    def owners(self) -> NDArray[np.int8]:
        """Return the `PageOwner` of each page, int8 ``[num_pages]``, as a copy."""
        return self._owners.copy()

    def is_cached(self, pages: Pages) -> NDArray[np.bool_]:
        """Tell per page whether it is CACHED now."""
        return np.equal(self._owners[pages], _CACHED)

    def allocate(self, count: int, owner: PageOwner) -> Pages:
        """Take ``count`` free pages and return their ids, ``[count]``.

        Raises:
            RuntimeError: If fewer are free: the caller asks `num_free` first.
        """
        if count > self._num_free:
            raise RuntimeError(f"{count} pages asked for, {self._num_free} free")
        self._num_free -= count
        pages = self._free[self._num_free : self._num_free + count].copy()
        self._owners[pages] = int(owner)
        self._hold(owner, count)
        if owner is PageOwner.KV:
            self._clocks.start(pages)
        self._num_sequences[pages] = owner is PageOwner.KV
        self._last_steps[pages] = -1
        return pages

    # --- shared KV pages ---

    def publish(self, pages: Pages) -> None:
        """Note that the prefix cache names these KV pages, so they are kept when no sequence holds them.

        Raises:
            RuntimeError: If a page is not held by a sequence, or is published already.
        """
        if (self._owners[pages] != _KV).any() or self._is_published[pages].any():
            raise RuntimeError(f"pages {pages.tolist()} are not all unpublished pages of sequences")
        self._is_published[pages] = True

    def share(self, pages: Pages) -> float:
        """Give one more sequence a hold on published pages; each page at most once in ``pages``.

        Returns:
            Page-seconds of the pages until now, which others pay for.

        Raises:
            RuntimeError: If a page is not published.
        """
        if len(pages) == 0:
            return 0.0
        if not self._is_published[pages].all():
            raise RuntimeError(f"pages {pages.tolist()} are not all published")
        revived = pages[self._owners[pages] == _CACHED]
        self._clocks.wake(revived)
        self._owners[pages] = _KV
        page_s = self._clocks.turn(pages, np.maximum(self._num_sequences[pages], 1))
        self._num_sequences[pages] += 1
        self._hold(PageOwner.CACHED, -len(revived))
        self._hold(PageOwner.KV, len(revived))
        self.num_revived += len(revived)
        return page_s

    def release(self, pages: Pages, last_step: int) -> float:
        """Take one sequence's hold away; pages without another are cached if they are published, else retired.

        Returns:
            Page-seconds of the pages since they were allocated; see `page_seconds`.

        Raises:
            RuntimeError: If a page is not held by a sequence.
        """
        if len(pages) == 0:
            return 0.0
        if (self._owners[pages] != _KV).any():
            raise RuntimeError(f"pages {pages.tolist()} are not all held by sequences")
        page_s = self._clocks.turn(pages, self._num_sequences[pages])
        self._num_sequences[pages] -= 1
        left = pages[self._num_sequences[pages] == 0]
        is_published = self._is_published[left]
        kept = left[is_published]
        self._owners[kept] = _CACHED
        self._last_steps[kept] = np.maximum(self._last_steps[kept], last_step)
        self._hold(PageOwner.KV, -len(kept))
        self._hold(PageOwner.CACHED, len(kept))
        self._retire(left[~is_published], PageOwner.KV, last_step)
        return page_s

    def evict(self, pages: Pages) -> None:
        """Take cached pages out; they are free at once, or when the last step that may read them is done.

        Raises:
            RuntimeError: If a page is not CACHED.
        """
        if (self._owners[pages] != _CACHED).any():
            raise RuntimeError(f"pages {pages.tolist()} are not all cached")
        self._is_published[pages] = False
        self._hold(PageOwner.CACHED, -len(pages))
        last_steps = self._last_steps[pages]
        last_step = int(last_steps.max(initial=-1))
        if last_step <= self._completed_step:
            self._release(pages)
            return
        is_done = last_steps <= self._completed_step
        self._release(pages[is_done])
        self._put_off(pages[~is_done], last_step)

    # --- the way back ---

    def retire(self, pages: Pages, last_step: int) -> None:
        """Take pages back; they are free once step ``last_step``, the last that may read or write them, is done.

        Raises:
            RuntimeError: If a page is not held, or is shared or published, or pages of both kinds are mixed.
        """
        if len(pages) == 0:
            return
        owner = int(self._owners[pages[0]])
        if owner not in _HOLDERS or (self._owners[pages] != owner).any():
            raise RuntimeError(f"pages {pages.tolist()} are {self._owners[pages].tolist()}, not all held by one owner")
        if self._is_published[pages].any() or (self._num_sequences[pages] > 1).any():
            raise RuntimeError(f"pages {pages.tolist()} are not all one sequence's own")
        self._retire(pages, PageOwner(owner), last_step)

    def _hold(self, owner: PageOwner, change: int) -> None:
        self._num_held[owner] += change
        self.page_seconds[owner].set(self._num_held[owner])

    def _retire(self, pages: Pages, owner: PageOwner, last_step: int) -> None:
        if len(pages) == 0:
            return
        self._hold(owner, -len(pages))
        self._num_sequences[pages] = 0
        if last_step <= self._completed_step:
            self._release(pages)
        else:
            self._put_off(pages, last_step)

    def _put_off(self, pages: Pages, last_step: int) -> None:
        if self._retiring and self._retiring[-1][0] > last_step:
            last_step = self._retiring[-1][0]  # a little later than needed keeps the queue in order
        self._owners[pages] = _RETIRING
        self._num_retiring += len(pages)
        self._retiring.append((last_step, pages))

    def complete(self, step_id: int) -> None:
        """Note that the device is done with all steps up to ``step_id``."""
        self._completed_step = max(self._completed_step, step_id)
        while self._retiring and self._retiring[0][0] <= self._completed_step:
            pages = self._retiring.popleft()[1]
            self._num_retiring -= len(pages)
            self._release(pages)

    def _release(self, pages: Pages) -> None:
        self._owners[pages] = _FREE
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)

    def check_integrity(self) -> None:
        """Recount everything.

        Raises:
            RuntimeError: If a page is lost, counted twice or listed as free while it is held.
        """
        counts = np.bincount(self._owners, minlength=len(PageOwner)).tolist()
        expected = [self._num_free, self.num_kv, self.num_adapter, self._num_retiring, self.num_cached]
        if counts != expected or sum(expected) != self.num_pages:
            raise RuntimeError(
                f"free, kv, adapter, retiring, cached are {counts}, accounted {expected} of {self.num_pages}"
            )
        is_kv, is_cached = self._owners == _KV, self._owners == _CACHED
        if not np.array_equal(self._num_sequences > 0, is_kv):
            raise RuntimeError("pages are held by sequences and not KV, or the other way round")
        if (self._is_published & ~(is_kv | is_cached)).any() or (is_cached & ~self._is_published).any():
            raise RuntimeError("a published page is neither KV nor cached, or a cached one is not published")
        free = np.sort(self._free[: self._num_free])
        if not np.array_equal(free, np.flatnonzero(self._owners == _FREE)):
            raise RuntimeError("the free list and the pages' owners disagree")

    def check_holds(self, held: NDArray[np.int32]) -> None:
        """Compare the sequences' holds with ``held``, the pages of all sequences one after another.

        Raises:
            RuntimeError: If a page is held by more or fewer sequences than accounted.
        """
        if not np.array_equal(np.bincount(held, minlength=self.num_pages), self._num_sequences):
            raise RuntimeError(f"sequences hold {len(held)} pages, the pool accounts {self._num_sequences.sum()} holds")
