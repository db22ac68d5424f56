"""A secret of the configuration: a value, or a file that is read again when it changes. Never printed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from loraplex_common.watched_files import WatchedFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN: Final = "********"


class SecretFileError(ValueError):
    """A file holds no secret; the message names the file and never quotes it."""


class Secret:
    """A value that only its holder may know.

    Args:
        value: The secret; it does not change.
    """

    def __init__(self, value: str) -> None:
        self._value: Callable[[], str] = lambda: value
        self._origin = HIDDEN

    @classmethod
    def from_file(cls, path: Path, *, clock: Callable[[], float] = time.monotonic) -> Secret:
        """Return a secret from a file that holds it on its only line.

        Raises:
            OSError: If the file cannot be read.
            SecretFileError: If the file is empty, has several lines or is not UTF-8.
        """
        secret = cls("")
        secret._value = WatchedFiles([path], lambda: _only_line(path), what=str(path), clock=clock).value
        secret._origin = f"in {path}"
        return secret

    def reveal(self) -> str:
        """Return the secret's present value."""
        return self._value()

    def __repr__(self) -> str:
        return f"Secret({self._origin})"

    __str__ = __repr__


def _only_line(path: Path) -> str:
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise SecretFileError(f"{path}: it is no UTF-8") from None
    if len(lines) != 1:
        raise SecretFileError(f"{path}: it must hold one line with the secret, not {len(lines)}")
    return lines[0]
