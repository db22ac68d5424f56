"""Which files a directory of the disk tier has, which were used last, and how many bytes they take; no async."""

from __future__ import annotations

import fcntl
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

from loraplex_adapter_store.disk.cache_file import TEMPORARY

if TYPE_CHECKING:
    from pathlib import Path


class DirectoryInUseError(ValueError):
    """Another store has the directory."""


class DiskIndex:
    """Files of one directory under a byte budget; the least recently used go first. From any thread.

    Args:
        directory: Created if missing; one store at a time uses it.
        max_bytes: Bytes of all files.

    Raises:
        DirectoryInUseError: If another store uses the directory.
        OSError: If it cannot be used.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self._lock = threading.Lock()
        self._max_bytes = max_bytes
        self._files: OrderedDict[str, int] = OrderedDict()  # name -> bytes, least recently used first
        self._num_bytes = 0
        self._guard = _exclusively(directory)
        self._scan()
        self.make_room(0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return self._num_bytes

    def files(self) -> list[tuple[str, int]]:
        """Return all files with their bytes, most recently used first."""
        with self._lock:
            return list(reversed(self._files.items()))

    def touch(self, name: str) -> bool:
        """Note a use, also for after a restart; return whether there is such a file."""
        with self._lock:
            if name not in self._files:
                return False
            self._files.move_to_end(name)
        with suppress(OSError):  # a directory that has become read-only still serves
            os.utime(self.directory / name)
        return True

    def add(self, name: str, num_bytes: int) -> None:
        """Take a file that has been written."""
        with self._lock:
            self._num_bytes += num_bytes - self._files.get(name, 0)
            self._files[name] = num_bytes
            self._files.move_to_end(name)

    def make_room(self, num_bytes: int) -> bool:
        """Delete files until there is room for more; return whether there can be."""
        if num_bytes > self._max_bytes:
            return False
        while True:
            with self._lock:
                if self._num_bytes + num_bytes <= self._max_bytes:
                    return True
                name = next(iter(self._files))
            self.remove(name)

    def remove(self, name: str) -> None:
        """Delete a file; those that have it mapped keep it."""
        with self._lock:
            self._num_bytes -= self._files.pop(name, 0)
        (self.directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another store use the directory."""
        os.close(self._guard)

    def _scan(self) -> None:
        found: list[tuple[int, str, int]] = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.endswith(TEMPORARY):
                    os.unlink(entry.path)  # its writer has died
                elif entry.name.endswith((".image", ".canonical")) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime_ns, entry.name, status.st_size))
        for _, name, size in sorted(found):
            self.add(name, size)


def _exclusively(directory: Path) -> int:
    """Return a descriptor that keeps other stores away while it is open."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        message = f"--disk-cache-dir {directory} is used by another adapter store: give each its own"
        raise DirectoryInUseError(message) from None
    return descriptor
