"""A number that processes share, in a file that they map: no call and no message to read or to set it."""

from __future__ import annotations

import mmap
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_FORMAT: Final = struct.Struct("d")


class SharedNumber:
    """A float in a file, 0.0 at first; one process writes it."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_FORMAT.size)
            self._memory = mmap.mmap(file.fileno(), _FORMAT.size)

    def get(self) -> float:
        """Return it."""
        return float(_FORMAT.unpack_from(self._memory)[0])

    def set(self, value: float) -> None:
        """Change it."""
        _FORMAT.pack_into(self._memory, 0, value)
