"""Names in order, in blocks of a few hundred: what is worked out of a block is worked out anew only where a name changed."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_NAMES: Final = 512


class NameBlock:
    """Names that follow each other; a change of one of them replaces the block.

    Attributes:
        names: The names in order.
        memo: What has been worked out of the block, by a key of the code that did.
    """

    __slots__ = ("memo", "names")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.memo: dict[object, Any] = {}


class NameBlocks:
    """A set of names as a list of blocks.

    A change costs a copy of one block, whatever the number of names is. A list that a reader took stays as it was.

    Args:
        names: The names to begin with, in any order; those that are in order already cost less.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        known, size = sorted(dict.fromkeys(names)), MAX_NAMES // 2
        self._blocks = [NameBlock(tuple(known[at : at + size])) for at in range(0, len(known), size)]

    def blocks(self, at: str = "") -> list[NameBlock]:
        """Return the blocks in order, beginning with the one that has a name, or would have it."""
        return self._blocks[self._place(at) :]

    def changed(self, name: str) -> None:
        """Take in a name that is new, or of which something has changed."""
        if not self._blocks:
            self._blocks.append(NameBlock((name,)))
            return
        place = self._place(name)
        names = self._blocks[place].names
        at = bisect.bisect_left(names, name)
        if names[at : at + 1] != (name,):
            names = (*names[:at], name, *names[at:])
        self._replace(place, names)

    def discard(self, name: str) -> None:
        """Forget a name, if it is known."""
        if not self._blocks:
            return
        place = self._place(name)
        names = self._blocks[place].names
        at = bisect.bisect_left(names, name)
        if names[at : at + 1] == (name,):
            self._replace(place, names[:at] + names[at + 1 :])

    def _replace(self, place: int, names: tuple[str, ...]) -> None:
        half = len(names) // 2
        parts = (names,) if len(names) <= MAX_NAMES else (names[:half], names[half:])
        self._blocks[place : place + 1] = [NameBlock(part) for part in parts if part]

    def _place(self, name: str) -> int:
        """Return the index of the block that has the name, or would have it."""
        return max(0, bisect.bisect_right(self._blocks, name, key=lambda block: block.names[0]) - 1)
