"""Files that other programs replace while the process runs: certificates, authorities, secrets."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

LOOK_EVERY_S: Final = 1.0
"""Longest time after a change of the files during which the old value may still be returned, in seconds."""

Value = TypeVar("Value")
State = tuple[tuple[int, ...], ...]

_log = get_logger()


def state_of(paths: Sequence[Path]) -> State:
    """Return a value that changes whenever a file does. Links are followed: a mounted secret is such a link.

    Raises:
        OSError: If a file is missing.
    """
    found = [os.stat(path) for path in paths]
    return tuple((each.st_dev, each.st_ino, each.st_mtime_ns, each.st_size) for each in found)


class WatchedFiles(Generic[Value]):
    """The value that files define, read again when they change. A failure is logged once; the old value stays valid.

    Any thread may ask for the value; files are checked at most every `LOOK_EVERY_S`.

    Args:
        paths: The files; all of them make one value.
        read: Reads and checks them; raises `OSError` (as `ssl` does) or `ValueError` if they cannot be used, without
            quoting them.
        what: Name of the files, for the log.
        clock: Monotonic seconds.

    Raises:
        OSError: If ``read`` raises it at the start.
        ValueError: If ``read`` raises it at the start.
    """

    def __init__(
        self, paths: Sequence[Path], read: Callable[[], Value], *, what: str, clock: Callable[[], float]
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._what = what
        self._clock = clock
        self._lock = threading.Lock()
        self._check_at = clock() + LOOK_EVERY_S
        # The state is read before the value, so a change in between is seen next time.
        self._state: State | None = state_of(self._paths)
        self._value = read()
        self._version = 0

    @property
    def version(self) -> int:
        """Rises whenever the value changes."""
        self._refresh()
        return self._version

    def value(self) -> Value:
        """Return the files' present value."""
        self._refresh()
        return self._value

    def _refresh(self) -> None:
        if self._clock() < self._check_at:
            return
        with self._lock:
            if self._clock() < self._check_at:
                return
            self._check_at = self._clock() + LOOK_EVERY_S
            self._look()

    def _look(self) -> None:
        state, trouble = None, None
        try:
            state = state_of(self._paths)
        except OSError as error:
            trouble = error
        if state == self._state:
            return
        self._state = state
        try:
            if trouble is not None:
                raise trouble
            value = self._read()
        except (OSError, ValueError) as error:
            _log.error("changed files cannot be used; what they held stays good", files=self._what, cause=str(error))
            return
        self._value = value
        self._version += 1
        _log.info("changed files were read again", files=self._what)
