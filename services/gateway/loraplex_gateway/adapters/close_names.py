"""Names in order, and those that look like a misspelt one, in a time that hardly depends on how many there are."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Final

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

# Names looked at in each order, on each side of where the name would be.
NUM_NEIGHBOURS: Final = 12
# Names passed over besides, which the caller may not see.
MAX_HIDDEN: Final = 100
MIN_LIKENESS: Final = 0.5
# No name of ours is longer; no more of a client's text is compared, or repeated.
MAX_NAME_CHARS: Final = 128


class NameOrder:
    """A set of names, kept sorted three ways: as they are, by their ends, and by what follows their namespace.

    A misspelt name has most of its letters right, so what is in front of the slip, behind it, or both, is right: the name
    that was meant is near it in one of the orders.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._orders: tuple[SortedList[tuple[str, str]], ...] = tuple(SortedList() for _ in _KEYS)
        for _ in self.adding(set(names)):
            pass

    def adding(self, names: Collection[str]) -> Iterator[None]:
        """Take names in that are new and differ, one order at each step: many at once are sorted, not put in one by one."""
        for key, order in zip(_KEYS, self._orders, strict=True):
            order.update((key(name), name) for name in names)
            yield

    def __iter__(self) -> Iterator[str]:
        """Yield the names in order; the set must not change meanwhile."""
        return (name for _, name in self._orders[0])

    def __contains__(self, name: str) -> bool:
        """Whether the name is one of them."""
        return (name, name) in self._orders[0]

    def add(self, name: str) -> None:
        """Take a name in, if it is new; it takes microseconds, however many there are."""
        if name not in self:
            for key, order in zip(_KEYS, self._orders, strict=True):
                order.add((key(name), name))

    def discard(self, name: str) -> None:
        """Forget a name, if it is known."""
        for key, order in zip(_KEYS, self._orders, strict=True):
            order.discard((key(name), name))

    def after(self, name: str = "") -> Iterator[str]:
        """Yield the names behind one, in order; the set may change meanwhile."""
        names = self._orders[0]
        while (place := names.bisect_right((name, name))) < len(names):
            name = names[place][1]
            yield name

    def like(self, name: str, *, is_visible: Callable[[str], bool] = lambda _: True, most: int = 3) -> list[str]:
        """Return names that look like this one, likest first; none if none does."""
        name = name[:MAX_NAME_CHARS]
        near: set[str] = set()
        for key, order in zip(_KEYS, self._orders, strict=True):
            near.update(_around(order, (key(name), name), is_visible))
        letters, pairs = Counter(name), _pairs(name)
        likeness = ((_likeness(letters, pairs, known), known) for known in near)
        close = sorted((-like, known) for like, known in likeness if like >= MIN_LIKENESS)
        return [known for _, known in close[:most]]


def _tail(name: str) -> str:
    return name.rpartition("/")[2]


_KEYS: Final[tuple[Callable[[str], str], ...]] = (str, lambda name: name[::-1], _tail)


def _around(
    order: SortedList[tuple[str, str]], where: tuple[str, str], is_visible: Callable[[str], bool]
) -> Iterator[str]:
    """Yield visible names on both sides of a place."""
    place = order.bisect_left(where)
    most = NUM_NEIGHBOURS + MAX_HIDDEN
    for side in (order[place : place + most], order[max(0, place - most) : place][::-1]):
        visible = (name for _, name in side if is_visible(name))
        yield from itertools.islice(visible, NUM_NEIGHBOURS)


def _pairs(name: str) -> Counter[str]:
    padded = f"^{_tail(name)}$"
    return Counter(first + second for first, second in itertools.pairwise(padded))


def _likeness(letters: Counter[str], pairs: Counter[str], known: str) -> float:
    """Return 0 to 1: the share of letters and of neighbouring letters that two names have in common, in the mean."""
    return (_common(letters, Counter(known)) + _common(pairs, _pairs(known))) / 2


def _common(first: Counter[str], second: Counter[str]) -> float:
    # A Counter asks a function in Python for what it lacks.
    shared = sum(min(count, second[item]) for item, count in first.items() if item in second)
    return 2 * shared / (first.total() + second.total())
