"""Whose constraint is compiled next: tenants take turns, and one alone leaves room for another."""

from __future__ import annotations

import asyncio
from collections import deque


class Turn:
    """A compile that waits, for one tenant or several.

    Attributes:
        keys: The tenants that wait for it.
        has_begun: Whether its turn has come.
    """

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.has_begun = False
        self.came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.taken_by = ""


class FairTurns:
    """Lets a few compiles run at once; belongs to one event loop.

    Each tenant's compiles begin in the order in which they came. One tenant has at most all places but one, if there are
    several: another's compile does not wait for those of a tenant whose every compile takes long.

    Args:
        num_places: Compiles at once.
    """

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._max_of_one = max(1, num_places - 1)
        self._waiting: dict[str, deque[Turn]] = {}
        self._num_running: dict[str, int] = {}

    def join(self, turn: Turn, key: str) -> None:
        """Let a tenant wait for a compile, perhaps one that another tenant waits for."""
        if key in turn.keys or turn.has_begun:
            return
        turn.keys.add(key)
        self._waiting.setdefault(key, deque()).append(turn)
        self._begin()

    def leave(self, turn: Turn) -> None:
        """End a compile, or drop one that waits."""
        if not turn.has_begun:
            for key in turn.keys:
                self._drop(turn, key)
            return
        self._num_free += 1
        self._num_running[turn.taken_by] -= 1
        if not self._num_running[turn.taken_by]:
            del self._num_running[turn.taken_by]
        self._begin()

    def _begin(self) -> None:
        while self._num_free and (key := self._next()) is not None:
            turn = self._waiting[key][0]
            for each in turn.keys:
                self._drop(turn, each)
            if key in self._waiting:
                self._waiting[key] = self._waiting.pop(key)  # behind all others
            turn.has_begun, turn.taken_by = True, key
            self._num_free -= 1
            self._num_running[key] = self._num_running.get(key, 0) + 1
            if not turn.came.done():  # else its compile has just been cancelled, and leaves in a moment
                turn.came.set_result(None)

    def _next(self) -> str | None:
        return next((key for key in self._waiting if self._num_running.get(key, 0) < self._max_of_one), None)

    def _drop(self, turn: Turn, key: str) -> None:
        waiting = self._waiting[key]
        waiting.remove(turn)
        if not waiting:
            del self._waiting[key]
