"""How warnings name modules: the first few, and how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_NAMED: Final = 5


def counted_names(names: Sequence[str]) -> str:
    """Return ``2 modules: a, b``; of many, the first `MAX_NAMED` and how many more there are."""
    more = len(names) - MAX_NAMED
    rest = f" and {more} more" if more > 0 else ""
    return f"{len(names)} module{'s' if len(names) > 1 else ''}: {', '.join(names[:MAX_NAMED])}{rest}"
