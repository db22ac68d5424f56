"""Memory for adapters and images that is used again: the kernel zeroes fresh pages, which takes longer than to fill them.

A buffer goes back when the last array that shows a part of it is gone, however many there were: nothing has to be freed by
hand, and nothing that is still read is written over.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ALIGN: Final = 2 * 1024 * 1024
"""Size of a huge page."""
_MAX_WASTE: Final = 2
"""A buffer serves only requests for at least a half of it."""


class BufferPool:
    """Gives out buffers from any thread, and keeps those that are idle within a bound.

    Args:
        max_idle_bytes: Bytes of all buffers that are kept for their next use; the longest unused go.
    """

    def __init__(self, max_idle_bytes: int) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []  # longest unused first
        self._returned: SimpleQueue[mmap.mmap] = SimpleQueue()  # of finalizers, which may run while the lock is held

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers that are kept for their next use."""
        with self._lock:
            self._settle()
            return sum(map(len, self._idle))

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return room for bytes, ``[num_bytes]``, uint8, with any content.

        Raises:
            OSError: If the system has no memory.
        """
        size = max(1, -(-num_bytes // _ALIGN)) * _ALIGN
        with self._lock:
            self._settle()
            fitting = [each for each in self._idle if size <= len(each) <= _MAX_WASTE * size]
            found = min(reversed(fitting), key=len, default=None)
            if found is not None:
                self._idle.remove(found)
        mapping = found if found is not None else _mapped(size)
        holder = (ctypes.c_char * len(mapping)).from_buffer(mapping)  # lives as long as any array of this memory
        weakref.finalize(holder, self._give_back, mapping).atexit = False
        return np.frombuffer(memoryview(holder).cast("B"), dtype=np.uint8, count=num_bytes)

    def _give_back(self, mapping: mmap.mmap) -> None:
        self._returned.put(mapping)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Take in what has come back and let go of what is too much; with the lock."""
        with contextlib.suppress(Empty):
            while True:
                mapping = self._returned.get_nowait()
                if len(mapping) <= self._max_idle_bytes:
                    self._idle.append(mapping)
        while sum(map(len, self._idle)) > self._max_idle_bytes:
            self._idle.pop(0)


def _mapped(size: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
