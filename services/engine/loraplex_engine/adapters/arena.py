"""The host arena: the tier right behind the pool, one piece of host memory that a store on this host writes into.

It is a sealed memory file (`loraplex_common.arena_file`, so no ``/dev/shm`` is needed). Bytes of the file, with H =
`HEADER_BYTES`, N slots, P = ``page_bytes`` and B = H + r * N * P:

    [0, 32)                          random nonce
    [32, H)                          rest of the header, unused
    [B + i * P, B + (i + 1) * P)     slot i of tensor-parallel rank r, for i in [0, N): one page

All ranks' images of an adapter lie in the same slots, each in its rank's part, so that one account of slots holds for all.

A store opens the file through ``/proc``, checks seals and nonce, and fills the slots it was granted; without shared
memory the engine's store client copies chunks into `view`. The kernel commits the memory as images arrive.

Threads: the slot allocator is thread-safe. Only the step loop's thread may make room, though, as that evicts images:
call `Engine.grant_slots`, not `allocate`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import threading
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.arena_file import NONCE_BYTES, create_arena_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HEADER_BYTES: Final = 4096
_WINDOW_SLOTS: Final = 2048


class HostArena:
    """Slots of ``page_bytes`` in a memory file, and which of them are free.

    Args:
        num_slots: Slots of each rank.
        page_bytes: Bytes of a slot.
        num_ranks: Tensor-parallel ranks.

    Attributes:
        fd: File descriptor of the memory file.
        nonce: 32 random bytes at its start.
        views: For each rank, uint8 ``[num_slots, page_bytes]``; slot i lies `first_byte` and ``i * page_bytes`` into the file.
    """

    def __init__(self, num_slots: int, page_bytes: int, num_ranks: int = 1) -> None:
        if num_slots <= 0 or page_bytes <= 0:
            raise ValueError(f"an arena of {num_slots} slots of {page_bytes} bytes has no room")
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        num_bytes = HEADER_BYTES + num_ranks * num_slots * page_bytes
        self.fd = create_arena_file(num_bytes)
        try:
            self._map = mmap.mmap(self.fd, num_bytes)
        except OSError:
            os.close(self.fd)
            raise
        self._map[:NONCE_BYTES] = self.nonce
        flat = np.frombuffer(self._map, dtype=np.uint8, offset=HEADER_BYTES)
        self.views: tuple[NDArray[np.uint8], ...] = tuple(flat.reshape(num_ranks, num_slots, page_bytes))
        self._lock = threading.Lock()
        self._is_free = np.ones(num_slots, dtype=np.bool_)
        self._num_free = num_slots
        self._cursor = 0  # end of the last allocation: a gap is most likely there

    @property
    def view(self) -> NDArray[np.uint8]:
        """Rank 0's part, ``[num_slots, page_bytes]``: all of it without other ranks."""
        return self.views[0]

    def first_byte(self, rank: int) -> int:
        """Return where a rank's part begins in the file."""
        return HEADER_BYTES + rank * self.views[0].nbytes

    @property
    def num_slots(self) -> int:
        """All slots of the arena."""
        return len(self._is_free)

    @property
    def num_free(self) -> int:
        """Slots that can be allocated now."""
        return self._num_free

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """Take ``count`` slots, consecutive ones if there is such a gap; None if fewer are free."""
        with self._lock:
            if count > self._num_free:
                return None
            chosen = self._neighbours(count, self._cursor, self._cursor + max(_WINDOW_SLOTS, 4 * count))
            if chosen is None:
                chosen = self._neighbours(count, 0, self.num_slots)
            if chosen is None:
                chosen = np.flatnonzero(self._is_free)[:count]
            if count:
                self._cursor = int(chosen[-1]) + 1 if int(chosen[-1]) + 1 < self.num_slots else 0
            self._is_free[chosen] = False
            self._num_free -= count
            return tuple(chosen.tolist())

    def _neighbours(self, count: int, begin: int, end: int) -> NDArray[np.intp] | None:
        """Return the first ``count`` free slots in a row in ``[begin, end)``, or None if there is no such gap."""
        free = np.flatnonzero(self._is_free[begin:end]) + begin
        if count == 0 or len(free) < count:
            return free[:0] if count == 0 else None
        # free[i + count - 1] - free[i] == count - 1 exactly where `count` neighbours are free from free[i] on
        starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        return free[starts[0] : starts[0] + count] if len(starts) else None

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back.

        Raises:
            RuntimeError: If a slot is free already.
        """
        with self._lock:
            for slot in slots:
                if self._is_free[slot]:
                    raise RuntimeError(f"arena slot {slot} is freed twice")
                self._is_free[slot] = True
            self._num_free += len(slots)

    def pages(self, slots: Sequence[int]) -> NDArray[np.uint8]:
        """Return rank 0's ``[len(slots), page_bytes]``: a view if the slots are consecutive, else a copy."""
        first = slots[0]
        if tuple(slots) == tuple(range(first, first + len(slots))):
            return self.view[first : first + len(slots)]
        return self.view[list(slots)]

    def check_integrity(self) -> None:
        """Recount the free slots.

        Raises:
            RuntimeError: If the count is off.
        """
        with self._lock:
            if int(self._is_free.sum()) != self._num_free:
                raise RuntimeError(f"{int(self._is_free.sum())} arena slots are free, {self._num_free} accounted")

    def close(self) -> None:
        """Release the memory; views of it that are still referenced keep theirs until they die."""
        if self.fd < 0:
            return
        self.views = tuple(np.empty((0, view.shape[1]), dtype=np.uint8) for view in self.views)
        with contextlib.suppress(BufferError):  # a view is still referenced; the end of the last view unmaps the memory
            self._map.close()
        os.close(self.fd)
        self.fd = -1
