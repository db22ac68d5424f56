"""Log files of child processes that stay bounded, however long the child runs."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
NUM_OLD_FILES: Final = 3
READ_BYTES: Final = 1 << 16
DRAIN_S: Final = 1.0


class RotatingLog:
    """Writes what a child prints to a file, and starts a new one when it is full: ``x.log``, ``x.log.1``, ... the oldest.

    The child writes to a pipe and never sees a file, so nothing is lost or doubled when one is exchanged. A thread reads
    the pipe: a child never waits for the owner's event loop.

    Args:
        path: The current file; appended to if it exists.
        max_file_bytes: A file that has reached this is followed by a new one at the next line.
    """

    def __init__(self, path: Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.path = path
        self._max_file_bytes = max_file_bytes
        self._threads: list[threading.Thread] = []

    def pipe(self) -> int:
        """Return the write end of a new pipe into the log; the caller closes it once the child has it."""
        source, sink = os.pipe()
        thread = threading.Thread(target=self._pump, args=(source,), name=f"log-{self.path.stem}", daemon=True)
        thread.start()
        self._threads = [*(old for old in self._threads if old.is_alive()), thread]
        return sink

    def drain(self) -> None:
        """Wait until what an ended child printed is in the file, at most `DRAIN_S`: grandchildren may hold the pipe."""
        for thread in self._threads:
            thread.join(DRAIN_S)

    def tail(self, num_lines: int) -> str:
        """Return the last lines, of the file before too where the current one has fewer."""
        lines: deque[str] = deque(maxlen=num_lines)
        for path in (self._old(1), self.path):
            if path.exists():
                with path.open(errors="replace") as log:
                    lines.extend(log)
        return "".join(lines).rstrip()

    def _pump(self, source: int) -> None:
        with os.fdopen(source, "rb", buffering=0) as stream:
            log: BinaryIO = self.path.open("ab")
            try:
                while data := stream.read(READ_BYTES):
                    log = self._write(log, data)
            finally:
                log.close()

    def _write(self, log: BinaryIO, data: bytes) -> BinaryIO:
        """Write data, exchanging the file at the end of a line once it is full; returns the file to go on with."""
        room = self._max_file_bytes - log.tell()
        cut = 0 if len(data) < room else data.find(b"\n", max(0, room - 1)) + 1
        if not cut and room > -self._max_file_bytes:  # else it prints no lines at all
            log.write(data)
            log.flush()
            return log
        log.write(data[:cut])
        log.close()
        for number in range(NUM_OLD_FILES, 0, -1):
            newer = self._old(number - 1)
            if newer.exists():
                newer.replace(self._old(number))
        return self._write(self.path.open("ab"), data[cut:])

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path
