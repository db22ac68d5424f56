"""How a service's allocator treats large buffers: they go back to the system when they are freed."""

from __future__ import annotations

import ctypes
import os
from typing import Final

# Parameters of glibc's mallopt(3), and the environment variables that set the same; so do glibc's tunables, all in one
# variable.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
SETTINGS: Final = (
    ("MALLOC_MMAP_THRESHOLD_", _MMAP_THRESHOLD, 1024 * 1024),
    ("MALLOC_TRIM_THRESHOLD_", _TRIM_THRESHOLD, 4 * 1024 * 1024),
    ("MALLOC_ARENA_MAX", _ARENA_MAX, 2),
)


def keep_heap_small() -> None:
    """Have freed memory given back, for a process that handles messages of megabytes and lives for months.

    Once a large buffer has been freed, glibc takes the next one out of its heap, up to 32 MiB, and any small object behind
    it keeps the heap from shrinking; each thread has a heap of its own besides. A gateway that refused a prompt of four
    megabytes now and then grew by 1.3 MiB a minute. Fixed thresholds end that; what an operator sets by environment
    variable or tunable stays. Call it before threads are started. Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    for variable, parameter, value in SETTINGS:
        tunable = f"glibc.malloc.{variable.removeprefix('MALLOC_').rstrip('_').lower()}="
        if variable not in os.environ and tunable not in tunables:
            mallopt(parameter, value)


def give_back_freed() -> None:
    """Have all that was freed given back at once, after a phase of many buffers that the process does not see again.

    Loading quantised weights left tens of megabytes between them. Does nothing with another C library.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
