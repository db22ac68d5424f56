"""Which token ids a request may name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_NAMED: Final = 8


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The ids of a base model, and those that an adapter adds behind them.

    Attributes:
        size: Rows of the base model's embedding: ids below it are the base's.
        added: Ids of the adapter's added tokens, wherever they lie.
    """

    size: int
    added: frozenset[int] = frozenset()

    def first_unknown(self, ids: Sequence[int]) -> int | None:
        """Return the first id that is neither the base's nor the adapter's; None if all are."""
        if not ids or (max(ids) < self.size and min(ids) >= 0):
            return None
        return next((each for each in ids if not (0 <= each < self.size or each in self.added)), None)

    def __str__(self) -> str:
        """Say which ids there are, for people."""
        base = f"0 to {self.size - 1}"
        beyond = sorted(each for each in self.added if each >= self.size)
        if not beyond:
            return base
        named = ", ".join(str(each) for each in beyond[:_MAX_NAMED])
        return f"{base} and {named}{' ...' if len(beyond) > _MAX_NAMED else ''}, which its adapter adds"
