"""The accounts of the unified page pool: which page is free, whose it is, and when it may be reused.

Only page ids live here; the memory is the runner's. A page whose owner lets go while steps that read it are still on
the device is *retiring*: it becomes free when the last such step is done (design.md section 5, "Overlapped").
"""

from __future__ import annotations

import enum
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PageOwner(enum.IntEnum):
    """What a page is used for."""

    FREE = 0
    KV = 1
    ADAPTER = 2
    RETIRING = 3


_HOLDERS: Final = (PageOwner.KV, PageOwner.ADAPTER)


class PagePool:
    """Hands out page ids from one free list, for KV blocks and adapters alike.

    Invariant: free + retiring + kv + adapter = total; `check_integrity` recounts it.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages <= 0:
            raise ValueError(f"num_pages {num_pages} is not positive")
        self._owners = np.full(num_pages, PageOwner.FREE, dtype=np.int8)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack; the valid part is [0, num_free)
        self._num_free = num_pages
        self._num_held = dict.fromkeys(_HOLDERS, 0)
        self._retiring: deque[tuple[int, NDArray[np.int32]]] = deque()  # by rising step id
        self._num_retiring = 0
        self._completed_step = -1

    @property
    def num_pages(self) -> int:
        """All pages."""
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
        """Pages of sequences."""
        return self._num_held[PageOwner.KV]

    @property
    def num_adapter(self) -> int:
        """Pages of adapters."""
        return self._num_held[PageOwner.ADAPTER]

    def allocate(self, count: int, owner: PageOwner) -> NDArray[np.int32]:
        """Take ``count`` free pages.

        Returns:
            Page ids, int32 ``[count]``.

        Raises:
            RuntimeError: If fewer are free: the caller asks `num_free` first.
        """
        if count > self._num_free:
            raise RuntimeError(f"{count} pages asked for, {self._num_free} free")
        self._num_free -= count
        pages = self._free[self._num_free : self._num_free + count].copy()
        self._owners[pages] = owner
        self._num_held[owner] += count
        return pages

    def retire(self, pages: NDArray[np.int32], last_step: int) -> None:
        """Give pages back; they are free once step ``last_step``, the last that may read or write them, is done.

        Raises:
            RuntimeError: If a page is not held, or pages of both kinds are mixed.
        """
        if len(pages) == 0:
            return
        owner = PageOwner(self._owners[pages[0]])
        if owner not in _HOLDERS or (self._owners[pages] != owner).any():
            raise RuntimeError(f"pages {pages.tolist()} are {self._owners[pages].tolist()}, not all held by one owner")
        self._num_held[owner] -= len(pages)
        if last_step <= self._completed_step:
            self._release(pages)
            return
        if self._retiring and self._retiring[-1][0] > last_step:
            last_step = self._retiring[-1][0]  # a little later than needed keeps the queue in order
        self._owners[pages] = PageOwner.RETIRING
        self._num_retiring += len(pages)
        self._retiring.append((last_step, pages))

    def complete(self, step_id: int) -> None:
        """Note that the device is done with all steps up to ``step_id``."""
        self._completed_step = max(self._completed_step, step_id)
        while self._retiring and self._retiring[0][0] <= self._completed_step:
            pages = self._retiring.popleft()[1]
            self._num_retiring -= len(pages)
            self._release(pages)

    def _release(self, pages: NDArray[np.int32]) -> None:
        self._owners[pages] = PageOwner.FREE
        self._free[self._num_free : self._num_free + len(pages)] = pages
        self._num_free += len(pages)

    def check_integrity(self) -> None:
        """Recount everything.

        Raises:
            RuntimeError: If a page is lost, counted twice or listed as free while it is held.
        """
        counts = np.bincount(self._owners, minlength=len(PageOwner)).tolist()
        expected = [self._num_free, self.num_kv, self.num_adapter, self._num_retiring]
        if counts != expected or sum(expected) != self.num_pages:
            raise RuntimeError(f"free, kv, adapter, retiring are {counts}, accounted {expected} of {self.num_pages}")
        free = np.sort(self._free[: self._num_free])
        if not np.array_equal(free, np.flatnonzero(self._owners == PageOwner.FREE)):
            raise RuntimeError("the free list and the pages' owners disagree")
