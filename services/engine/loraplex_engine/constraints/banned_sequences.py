"""Token sequences that an output must not contain: their last token cannot be drawn after the others."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class BannedSequences:
    """What one output may not go on with, by its last tokens; the cost of a token depends on how many lengths there are.

    Args:
        sequences: Sequences of token ids, none empty.
        token_ids: The output so far.
    """

    def __init__(self, sequences: Sequence[tuple[int, ...]], token_ids: Sequence[int] = ()) -> None:
        lasts: dict[tuple[int, ...], set[int]] = {}
        for sequence in sequences:
            lasts.setdefault(sequence[:-1], set()).add(sequence[-1])
        self._lasts = {beginning: frozenset(ids) for beginning, ids in lasts.items()}
        self._lengths = sorted({len(beginning) for beginning in lasts})
        longest = self._lengths[-1] if self._lengths else 0
        self._tail: deque[int] = deque(token_ids[-longest:] if longest else (), maxlen=longest)

    def accept(self, token_id: int) -> None:
        """Take in a drawn token."""
        self._tail.append(token_id)

    def banned_now(self) -> set[int]:
        """Return the tokens that would complete a sequence."""
        tail = tuple(self._tail)
        banned: set[int] = set()
        for length in self._lengths:
            if length <= len(tail):
                banned |= self._lasts.get(tail[len(tail) - length :], frozenset())
        return banned
