"""sha256 of weight files, as the Hugging Face hub names them; each big file is hashed once per machine.

A digest is kept in a small file of its own, under the facts of the file system that only change when the weights do:
path, inode, size, times of last modification and change. A process that needs the digest holds a lock on that file: if
gateway, engine and store start together, one of them hashes and the others wait and read. A kept digest that is
unreadable, or of another state of the weights, is computed again. If no digest can be kept, every process hashes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.config_values import BaseModelError
from loraplex_common.log import get_logger
from loraplex_common.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIN_KEPT_BYTES: Final = 64 * 1024 * 1024
"""Smaller files are hashed faster than a lock and a look-up are worth."""
SETTLED_S: Final = 2.0
"""A file changed less long ago may change again without a change of its times: clocks of file systems tick slowly."""
CHUNK_BYTES: Final = 1024 * 1024
MAX_THREADS: Final = 8
PROGRESS_S: Final = 5.0
LOCK_POLL_S: Final = 0.1
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_log = get_logger()


def cache_dir() -> Path:
    """Return the folder of what loraplex can make again: ``$LORAPLEX_CACHE``, else ``~/.cache/loraplex``.

    Raises:
        RuntimeError: If there is no home directory.
    """
    return Path(os.environ.get("LORAPLEX_CACHE") or Path.home() / ".cache" / "loraplex").expanduser()


def weight_digests(files: Sequence[Path]) -> dict[Path, str]:
    """Return the sha256 of each file, hex digits in lower case, from this user's cache if it has them.

    Raises:
        BaseModelError: If a file changes while it is read.
        OSError: If it cannot be read.
    """
    try:
        folder = cache_dir() / "digests"
    except RuntimeError:
        folder = None
    return WeightDigests(folder).of(files)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileState:
    """The file system's facts of a file; if they differ, the file's bytes may differ."""

    path: str
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> FileState:
        """Return the state of a file, from its status."""
        return cls(
            path=str(path),
            inode=status.st_ino,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
        )


class _Entry:
    """One kept digest, locked while it is held."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, state: FileState) -> str | None:
        """Return the kept digest, if it is that of a file in this state."""
        self._file.seek(0)
        try:
            kept = json.loads(self._file.read())
            digest = kept.pop("sha256")
        except (ValueError, AttributeError, KeyError, TypeError):
            return None
        return digest if kept == asdict(state) and _SHA256.fullmatch(str(digest)) else None

    def write(self, state: FileState, digest: str) -> None:
        """Keep a digest. No reader sees half of it: the lock is held, and the remains of a crash are not valid JSON."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({**asdict(state), "sha256": digest}).encode())
        self._file.flush()


class WeightDigests:
    """Hashes files in parallel and keeps the digests.

    Args:
        folder: Folder of the kept digests; None keeps none.
        min_kept_bytes: Smaller files are hashed each time.
        settled_s: A digest is kept only if the file's last change was at least so long before it was read.
    """

    def __init__(
        self, folder: Path | None, *, min_kept_bytes: int = MIN_KEPT_BYTES, settled_s: float = SETTLED_S
    ) -> None:
        self._folder = folder
        self._min_kept_bytes = min_kept_bytes
        self._settled_s = settled_s
        self._stop = threading.Event()
        self._done_bytes = 0
        self._counting = threading.Lock()

    def of(self, files: Sequence[Path]) -> dict[Path, str]:
        """Return the sha256 of each file.

        Raises:
            BaseModelError: If a file changes while it is read.
            OSError: If it cannot be read.
        """
        total, self._done_bytes, self._stop = sum(file.stat().st_size for file in files), 0, threading.Event()
        with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, MAX_THREADS) or 1) as pool:
            running = {file: pool.submit(self._digest, file.resolve()) for file in files}
            pending = set(running.values())
            try:
                while pending:
                    done, pending = wait(pending, PROGRESS_S, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if pending:
                        _log.info("hashing weights", done=format_size(self._done_bytes), of=format_size(total))
            finally:
                self._stop.set()  # an interrupt or a failure ends the other threads too
            return {file: future.result() for file, future in running.items()}

    def _digest(self, path: Path) -> str:
        state = FileState.of(path, path.stat())
        if state.size < self._min_kept_bytes:
            return self._hash(path)[1]
        with self._entry(path) as entry:
            if entry is not None and (kept := entry.read(state)) is not None:
                self._count(state.size)
                return kept
            _log.info("hashing weights", file=str(path), size=format_size(state.size))
            began = time.time()
            state, digest = self._hash(path)
            if entry is not None and max(state.mtime_ns, state.ctime_ns) <= (began - self._settled_s) * 1e9:
                try:
                    entry.write(state, digest)
                except OSError as error:
                    _cannot_keep(error)
            return digest

    @contextmanager
    def _entry(self, path: Path) -> Iterator[_Entry | None]:
        """Hold the entry of a file's digest; None if there can be none."""
        file = None
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
                file = (self._folder / f"{name}.json").open("a+b")
                self._lock(file.fileno())
            except OSError as error:
                _cannot_keep(error)
                if file is not None:
                    file.close()
                    file = None
        if file is None:
            yield None
            return
        with file:  # closing it releases the lock
            yield _Entry(file)

    def _lock(self, descriptor: int) -> None:
        is_told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not is_told:
                    _log.info("waiting for another process that hashes the weights")
                    is_told = True
                if self._stop.wait(LOCK_POLL_S):
                    raise BaseModelError("stopped while hashing the weights") from None
            else:
                return

    def _hash(self, path: Path) -> tuple[FileState, str]:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
        with path.open("rb", buffering=0) as file:
            before = FileState.of(path, os.fstat(file.fileno()))
            while num_bytes := file.readinto(buffer):
                digest.update(buffer[:num_bytes])  # other threads run meanwhile
                self._count(num_bytes)
                if self._stop.is_set():
                    raise BaseModelError("stopped while hashing the weights")
            if FileState.of(path, os.fstat(file.fileno())) != before:
                raise BaseModelError(f"{path}: changed while it was read; start again once it is whole")
        return before, digest.hexdigest()

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self._done_bytes += num_bytes


def _cannot_keep(error: OSError) -> None:
    _log.warning("digests of weights cannot be kept: every start hashes them again", error=str(error))
