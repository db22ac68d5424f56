"""Child processes for untrusted files, each with its share of memory, time and output; they end with the import.

A child inherits no environment and no descriptors except its input and output, which are memory files. It sets its own
limits before it reads the input, so the input cannot make it take more. The kernel enforces the limits: a library
written in C or Rust that takes all memory or never returns ends like any other program.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from loraplex_adapter_store.checkpoint.bounds import MAX_CHILDREN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from loraplex_adapter_store.checkpoint.bounds import Share

OUT_OF_MEMORY: Final = 77
"""Exit code of a child that ran out of memory and could still report it."""
_POLL_S: Final = 0.05
# This runs first in the child. Memory is counted from here on: the libraries are loaded already.
_LAUNCHER: Final = """
import os, resource, runpy, sys
program, memory, seconds, output = sys.argv[1], *map(int, sys.argv[2:5])
def limit(kind, value):
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
with open("/proc/self/statm") as file:
    memory += int(file.read().split()[0]) * resource.getpagesize()
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_CPU, seconds)
limit(resource.RLIMIT_FSIZE, output)
limit(resource.RLIMIT_AS, memory)
os.nice(5)
try:
    runpy.run_path(program, run_name="__main__")
except MemoryError:
    os._exit(77)
"""
_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_places = threading.BoundedSemaphore(MAX_CHILDREN)


class ConfinementClosedError(Exception):
    """The import that a child worked for has ended."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended.

    Attributes:
        end: ``done``, or the part of its share that was too small; a crash counts as memory, as libraries crash without
            it.
        output: Output of the child; complete only if it is done.
    """

    end: Literal["done", "memory", "time"]
    output: bytes


class Confinement:
    """The child processes of one import, one at a time; `close` may be called from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_closed = False
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, program: Path, pieces: Iterable[bytes | bytearray], share: Share, *, needs_packages: bool) -> Outcome:
        """Run a Python file on some input and return its output; blocks, for at most the share's time once it runs.

        Args:
            program: The file.
            pieces: Its standard input.
            share: The child's resources.
            needs_packages: Whether the program imports more than the standard library.

        Raises:
            ConfinementClosedError: If `close` was or is called.
        """
        with _place(self), _memory_file() as given, _memory_file() as written:
            for piece in pieces:
                _write(given, piece)
            os.lseek(given, 0, os.SEEK_SET)
            process = self._start(_command(program, share, needs_packages=needs_packages), given, written)
            try:
                is_late = False
                process.wait(share.time_s)
            except subprocess.TimeoutExpired:
                is_late = True
            finally:
                process.kill()
                process.wait()
                with self._lock:
                    self._process = None
            self.check_open()
            return Outcome(_end(process.returncode, is_late=is_late), os.pread(written, share.output_bytes, 0))

    def check_open(self) -> None:
        """Raise `ConfinementClosedError` once closed."""
        if self._is_closed:
            raise ConfinementClosedError

    def close(self) -> None:
        """End the child, and start no other child."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()

    def _start(self, command: list[str], given: int, written: int) -> subprocess.Popen[bytes]:
        with self._lock:
            self.check_open()
            self._process = subprocess.Popen(
                command, stdin=given, stdout=written, stderr=subprocess.DEVNULL, env=_ENVIRONMENT, cwd="/"
            )
            return self._process


def _command(program: Path, share: Share, *, needs_packages: bool) -> list[str]:
    flags = ["-I"] if needs_packages else ["-I", "-S"]
    limits = (share.memory_bytes, max(1, -int(-share.time_s // 1)), share.output_bytes)
    return [sys.executable, *flags, "-c", _LAUNCHER, str(program), *map(str, limits)]


def _end(code: int, *, is_late: bool) -> Literal["done", "memory", "time"]:
    if is_late or code in (-24, -9):  # SIGXCPU, and the kernel's SIGKILL at the hard limit
        return "time"
    return "done" if code == 0 else "memory"


@contextmanager
def _place(confinement: Confinement) -> Iterator[None]:
    """Hold one of the places for children, which all imports share."""
    while not _places.acquire(timeout=_POLL_S):
        confinement.check_open()
    try:
        yield
    finally:
        _places.release()


@contextmanager
def _memory_file() -> Iterator[int]:
    descriptor = os.memfd_create("loraplex-child", os.MFD_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, piece: bytes | bytearray) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
