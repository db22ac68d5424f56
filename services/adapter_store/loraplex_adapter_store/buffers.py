"""Memory for adapters and images that is used again: the kernel zeroes fresh pages, which takes longer than to fill them.

A buffer goes back when the last array that shows a part of it is gone, however many there were: nothing has to be freed by
hand, and nothing that is still read is written over.

An image that is kept does not come back, and the next one would need fresh memory: so a thread touches some buffers ahead, of the
size that was asked for last, as adapters of one store are mostly alike. It does so only while no image is made: it would take the
cores, and the memory's bandwidth, from what an engine waits for.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_log = get_logger()
NUM_AHEAD: Final = 8
"""Buffers that are touched before they are asked for: two rounds of what one engine has on its way at once."""

_ALIGN: Final = 2 * 1024 * 1024
"""Size of a huge page."""
_MAX_WASTE: Final = 2
"""A buffer serves only requests for at least a half of it."""
_SMALL_PAGE: Final = 4096
"""Step in which memory is touched, as there may be no huge pages."""


class BufferPool:
    """Gives out buffers from any thread, and keeps those that are idle within a bound.

    Args:
        max_idle_bytes: Bytes of all buffers that are kept for their next use, or touched ahead; the longest unused go.
        num_ahead: Buffers of the size that was asked for last that are to be idle, within ``max_idle_bytes``; a thread touches
            those that are missing, and takes no other buffer's place.
    """

    def __init__(self, max_idle_bytes: int, *, num_ahead: int = 0) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._num_ahead = num_ahead
        self._last_size = 0
        self._is_closed = False
        self._num_busy = self._num_made = 0
        self._changed = threading.Condition()  # of the three above
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []  # longest unused first
        self._returned: SimpleQueue[mmap.mmap] = SimpleQueue()  # of finalizers, which may run while the lock is held
        self._toucher: threading.Thread | None = None
        if num_ahead:
            self._toucher = threading.Thread(target=self._touch_ahead, name="touch", daemon=True)
            self._toucher.start()

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
            found = min(reversed(self._fitting(size)), key=len, default=None)
            if found is not None:
                self._idle.remove(found)
            self._last_size = size
        mapping = found if found is not None else _mapped(size)
        holder = (ctypes.c_char * len(mapping)).from_buffer(mapping)  # lives as long as any array of this memory
        weakref.finalize(holder, self._give_back, mapping).atexit = False
        return np.frombuffer(memoryview(holder).cast("B"), dtype=np.uint8, count=num_bytes)

    def close(self) -> None:
        """Touch no more memory; waits for the thread that does. Buffers that are given out stay valid."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._toucher is not None:
            self._toucher.join()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Let no memory be touched ahead in the block; after the last one, what is missing is touched."""
        with self._changed:
            self._num_busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_busy -= 1
                self._num_made += 1
                self._changed.notify_all()

    def _fitting(self, size: int) -> list[mmap.mmap]:
        """Return the idle buffers that serve a request; with the lock."""
        return [each for each in self._idle if size <= len(each) <= _MAX_WASTE * size]

    def _size_to_touch(self) -> int:
        """Return the size of a buffer that is missing and has room, 0 if there is none; with the lock."""
        size = self._last_size
        is_missing = len(self._fitting(size)) < self._num_ahead
        has_room = sum(map(len, self._idle)) + size <= self._max_idle_bytes
        return size if is_missing and has_room and not self._is_closed else 0

    def _touch_ahead(self) -> None:
        num_made = 0
        while True:
            with self._changed:
                while not self._is_closed and self._num_made == num_made:
                    self._changed.wait()
                num_made = self._num_made
            if self._is_closed:
                return
            while size := self._missing():
                try:
                    mapping = _mapped(size)
                except OSError as error:
                    _log.warning("no memory is touched ahead", num_bytes=size, error=error.strerror)
                    break
                self._touch(mapping)
                self._returned.put(mapping)

    def _missing(self) -> int:
        with self._lock:
            self._settle()
            return self._size_to_touch()

    def _touch(self, mapping: mmap.mmap) -> None:
        """Let the kernel give a buffer its memory, in steps that let other threads run: in each, numpy frees the interpreter."""
        array = np.frombuffer(mapping, dtype=np.uint8)
        for start in range(0, len(array), _ALIGN):
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or not self._num_busy)
            if self._is_closed:
                return
            array[start : start + _ALIGN : _SMALL_PAGE] = 0

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
