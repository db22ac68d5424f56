"""Writes page images straight into an engine's host arena, if both run on one host."""

from __future__ import annotations

import os
import secrets
import threading
from typing import TYPE_CHECKING

from loraplex_common.arena_file import NONCE_BYTES, open_arena_file
from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from loraplex_adapter_store.attach.messages import ArenaInfo

_log = get_logger()


class SharedArena:
    """An engine's arena opened through ``/proc/<pid>/fd/<fd>``.

    It is written with pwrite, not through a mapping: an engine's file must not be able to kill the store with SIGBUS.

    Args:
        descriptor: File descriptor, open for reading and writing; owned by this object.
    """

    def __init__(self, descriptor: int, info: ArenaInfo, page_bytes: int) -> None:
        self._descriptor = descriptor
        self._header_bytes = info.header_bytes
        self._page_bytes = page_bytes

    @classmethod
    def open(cls, info: ArenaInfo, page_bytes: int) -> SharedArena | None:
        """Open an arena; None if it cannot be reached from here or is not this engine's (then chunks are sent).

        `open_arena_file` proves that the file is an arena and not another file that this user holds open. The nonce
        proves that it is the arena the engine means, and not one with the same number in this store's process
        namespace.
        """
        if info.pid <= 0 or info.fd < 0 or len(info.nonce) != NONCE_BYTES or info.header_bytes < NONCE_BYTES:
            return None
        try:
            descriptor = open_arena_file(info.pid, info.fd)
        except OSError as error:
            _log.info("arena is not on this host; images are sent in chunks", pid=info.pid, error=error.strerror)
            return None
        except ValueError as error:
            _log.warning("arena refused; images are sent in chunks", pid=info.pid, fd=info.fd, error=str(error))
            return None
        needed = info.header_bytes + info.num_slots * page_bytes
        is_large_enough = os.fstat(descriptor).st_size >= needed
        if not is_large_enough or not secrets.compare_digest(os.pread(descriptor, NONCE_BYTES, 0), info.nonce):
            os.close(descriptor)
            _log.warning("arena file is not the engine's; images are sent in chunks", pid=info.pid, fd=info.fd)
            return None
        return cls(descriptor, info, page_bytes)

    def write(self, slot: int, page: NDArray[np.uint8]) -> None:
        """Write one page into a slot; blocks for a memory copy.

        Raises:
            OSError: If the file cannot be written.
        """
        position = self._header_bytes + slot * self._page_bytes
        rest = page.data.cast("B")
        while rest:
            written = os.pwrite(self._descriptor, rest, position)
            rest = rest[written:]
            position += written

    def close(self) -> None:
        """Close the file; no thread may be writing to it."""
        os.close(self._descriptor)


class SlotSink:
    """Writes the pages of one image into their slots, from several threads and in any order, until it is closed.

    Args:
        arena: The arena; it must not be closed before this.
        slots: Slot of each page.
        on_written: Called in the writing thread with the number of each page that has been written.

    Attributes:
        is_complete: Whether all pages have been written.
    """

    def __init__(self, arena: SharedArena, slots: tuple[int, ...], on_written: Callable[[int], None]) -> None:
        self._arena = arena
        self._slots = slots
        self._on_written = on_written
        self._changed = threading.Condition()
        self._num_running = self._num_written = 0
        self._is_closed = False

    @property
    def is_complete(self) -> bool:
        """Whether all pages are in their slots."""
        return self._num_written == len(self._slots)

    def __call__(self, number: int, page: NDArray[np.uint8]) -> None:
        """Write a page; nothing happens once it is closed, or if the file cannot be written: `is_complete` stays false."""
        with self._changed:
            if self._is_closed:
                return
            self._num_running += 1
        try:
            self._arena.write(self._slots[number], page)
        except OSError as error:
            _log.warning("a page could not be written into an arena", error=error.strerror)
        else:
            self._on_written(number)
            with self._changed:
                self._num_written += 1
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let no thread write any more; waits for a page that is being written."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: not self._num_running)
