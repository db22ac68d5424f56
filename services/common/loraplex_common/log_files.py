"""Log files of child processes; their size is limited, however long the child runs."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from io import FileIO
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
NUM_OLD_FILES: Final = 3
READ_BYTES: Final = 1 << 16
RESERVE_BYTES: Final = 64 * 1024 * 1024
RESERVE_SHARE: Final = 0.05
"""Disk space, whichever is less, that logs leave free: adapters are on the same disk."""
KEPT_BYTES: Final = 1 << 16
DRAIN_S: Final = 1.0


class RotatingLog:
    """Writes a child's output to a file, and starts a new one when it is full: ``x.log``, ``x.log.1``, ... the oldest.

    The child writes to a pipe and never sees a file, so no line is lost or doubled when files change. A thread reads
    the pipe, so a child never waits for the owner's event loop. While the disk has no room, the last `KEPT_BYTES` stay
    in memory; they are written to the file once there is room.

    Args:
        path: The current file; appended to if it exists.
        max_file_bytes: Once a file has this size, the next line starts a new one.
    """

    def __init__(self, path: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.path = path
        self._max_file_bytes = max_file_bytes
        self._threads: list[threading.Thread] = []
        self._unwritten = b""
        self._num_lost = 0

    def pipe(self) -> int:
        """Return the write end of a new pipe into the log; the caller closes it after the child has inherited it."""
        source, sink = os.pipe()
        thread = threading.Thread(target=self._pump, args=(source,), name=f"log-{self.path.stem}", daemon=True)
        thread.start()
        self._threads = [*(old for old in self._threads if old.is_alive()), thread]
        return sink

    def drain(self) -> None:
        """Wait until an ended child's output is in the file, at most `DRAIN_S`: grandchildren may hold the pipe."""
        for thread in self._threads:
            thread.join(DRAIN_S)

    def tail(self, num_lines: int) -> str:
        """Return the last lines; if the current file has too few, those of the file before are included."""
        lines: deque[str] = deque(maxlen=num_lines)
        for path in (self._old(1), self.path):
            if path.exists():
                with path.open(errors="replace") as log:
                    lines.extend(log)
        lines.extend(self._unwritten.decode(errors="replace").splitlines(keepends=True))
        return "".join(lines).rstrip()

    def _pump(self, source: int) -> None:
        with os.fdopen(source, "rb", buffering=0) as stream:
            log: FileIO | None = None
            try:
                while data := stream.read(READ_BYTES):
                    log = self._put(log, data)
            finally:
                if log is not None:
                    log.close()

    def _put(self, log: FileIO | None, data: bytes) -> FileIO | None:
        """Write data, or keep its end while the disk has no room: the pipe must be read, or the child would stop.

        Returns:
            The file to go on with; None if it has to be opened.
        """
        pending = self._unwritten + data
        try:
            if not _has_room(self.path.parent):
                raise OSError(errno.ENOSPC, "no room for logs")
            if log is None:
                log = FileIO(self.path, "ab")
            if self._num_lost:
                _write_all(log, b"... %d bytes of log are lost: the disk had no room\n" % self._num_lost)
            log = self._write(log, pending)
        except OSError:
            self._num_lost += max(0, len(pending) - KEPT_BYTES)
            self._unwritten = pending[-KEPT_BYTES:]
            if log is not None:
                log.close()
            return None
        self._unwritten, self._num_lost = b"", 0
        return log

    def _write(self, log: FileIO, data: bytes) -> FileIO:
        """Write data, and change files at the end of a line once one is full; returns the file to go on with."""
        room = self._max_file_bytes - log.tell()
        cut = 0 if len(data) < room else data.find(b"\n", max(0, room - 1)) + 1
        if not cut and room > -self._max_file_bytes:  # otherwise the output has no line ends at all
            _write_all(log, data)
            return log
        _write_all(log, data[:cut])
        log.close()
        for number in range(NUM_OLD_FILES, 0, -1):
            newer = self._old(number - 1)
            if newer.exists():
                newer.replace(self._old(number))
        return self._write(FileIO(self.path, "ab"), data[cut:])

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


def _has_room(directory: Path) -> bool:
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize >= min(RESERVE_BYTES, RESERVE_SHARE * disk.f_blocks * disk.f_frsize)


def _write_all(log: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:  # a disk that fills up takes only a part
        left = left[log.write(left) :]
