"""Writes page images straight into an engine's host arena where both run on one host."""

from __future__ import annotations

import os
import secrets
import stat
from typing import TYPE_CHECKING, Final

from loraplex_common.log import get_logger

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from loraplex_adapter_store.attach.messages import ArenaInfo

_log = get_logger()
NONCE_BYTES: Final = 32


class SharedArena:
    """An engine's arena opened through ``/proc/<pid>/fd/<fd>``.

    Written with pwrite, not through a mapping: an engine that shrinks its file must not be able to kill the store with
    SIGBUS.

    Args:
        descriptor: Open for reading and writing; owned by this object.
    """

    def __init__(self, descriptor: int, info: ArenaInfo, page_bytes: int) -> None:
        self._descriptor = descriptor
        self._header_bytes = info.header_bytes
        self._page_bytes = page_bytes

    @classmethod
    def open(cls, info: ArenaInfo, page_bytes: int) -> SharedArena | None:
        """Open an arena; None if it cannot be reached from here or is not this engine's (then chunks are sent).

        The nonce proves that the file is the one the engine means, and not one that merely has the same number in this
        store's process namespace.
        """
        if info.pid <= 0 or info.fd < 0 or len(info.nonce) != NONCE_BYTES or info.header_bytes < NONCE_BYTES:
            return None
        try:
            descriptor = os.open(f"/proc/{info.pid}/fd/{info.fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            _log.info("arena is not on this host; images are sent in chunks", pid=info.pid, error=error.strerror)
            return None
        status = os.fstat(descriptor)
        needed = info.header_bytes + info.num_slots * page_bytes
        if (
            not stat.S_ISREG(status.st_mode)
            or status.st_size < needed
            or not secrets.compare_digest(os.pread(descriptor, NONCE_BYTES, 0), info.nonce)
        ):
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
        """Close the file; nothing may be writing."""
        os.close(self._descriptor)
