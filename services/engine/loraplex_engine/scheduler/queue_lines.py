"""One fairness key's eligible requests of one class of service."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_engine.scheduler.request import Request


class Line:
    """A set of requests that gives its oldest and its newest in O(log n).

    Entries of requests that left stay in the heaps until they reach the top, or until they outnumber the others.

    Args:
        has_newest: Whether `newest` will be used.
    """

    def __init__(self, *, has_newest: bool) -> None:
        self._has_newest = has_newest
        self._members: dict[int, Request] = {}
        self._oldest: list[int] = []
        self._newest: list[int] = []  # negated

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members.values())

    def add(self, request: Request) -> None:
        """Take a request in."""
        self._members[request.number] = request
        heapq.heappush(self._oldest, request.number)
        if self._has_newest:
            heapq.heappush(self._newest, -request.number)
        if len(self._oldest) > 64 + 2 * len(self._members):
            self._oldest = sorted(self._members)
            self._newest = [-number for number in reversed(self._oldest)] if self._has_newest else []

    def remove(self, request: Request) -> None:
        """Let a request go.

        Raises:
            KeyError: If it is not in the line.
        """
        del self._members[request.number]

    @property
    def oldest(self) -> Request:
        """The request that arrived first."""
        while self._oldest[0] not in self._members:
            heapq.heappop(self._oldest)
        return self._members[self._oldest[0]]

    @property
    def newest(self) -> Request:
        """The request that arrived last."""
        while -self._newest[0] not in self._members:
            heapq.heappop(self._newest)
        return self._members[-self._newest[0]]
