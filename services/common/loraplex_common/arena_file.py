"""Proves that an open file is an engine's arena, for the engine that makes one and the store that writes into one.

An engine that attaches names a process and a descriptor. The store opens ``/proc/<pid>/fd/<fd>`` with its own rights,
which reach every file that this user holds open. So the file must be one that only an arena can be: a memory file of
`NAME` with exactly `SEALS`. No file on a disk can have seals, and no process adds them to another file by accident.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

NAME: Final = "loraplex-arena"
NONCE_BYTES: Final = 32
# A file that cannot shrink cannot kill its writer with SIGBUS; F_SEAL_SEAL prevents further seals, such as against
# writes.
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_LINK: Final = f"/memfd:{NAME} (deleted)"


def create_arena_file(num_bytes: int) -> int:
    """Return the descriptor of a new memory file of fixed size, filled with zeros.

    Raises:
        OSError: If the kernel has no room for it.
    """
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_arena_file(pid: int, descriptor: int) -> int:
    """Return a descriptor, for reading and writing, of the arena that a process holds open.

    Raises:
        OSError: If the file cannot be opened from here.
        ValueError: If the file is not an arena; none of it was read or written.
    """
    path = f"/proc/{pid}/fd/{descriptor}"
    if os.readlink(path) != _LINK:  # before the open: opening a device or a pipe may have effects
        raise ValueError("the file is no memory file of an arena")
    opened = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    if not _is_sealed(opened):  # checked on the opened file: the link may have changed since
        os.close(opened)
        raise ValueError("the file is not sealed as an arena is")
    return opened


def _is_sealed(descriptor: int) -> bool:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == SEALS
    except OSError:  # EINVAL: only memory files have seals
        return False
