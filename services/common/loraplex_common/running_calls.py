"""Counts a server's running calls, so that it can stop without failing one, and end connections without calls."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from loraplex_common.errors import DrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator


class RunningCalls:
    """Counts calls by their peers; health watches, which never end, are not counted."""

    def __init__(self) -> None:
        self._is_refusing = False
        self._by_peer: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse_new(self) -> None:
        """Answer every further call with DRAINING; running calls go on."""
        self._is_refusing = True

    async def wait_until_idle(self) -> None:
        """Wait until no call runs."""
        await self._idle.wait()

    def has_any_of(self, peer: str) -> bool:
        """Return whether a peer, as gRPC names it, has a running call."""
        return peer in self._by_peer

    @contextmanager
    def count(self, peer: str) -> Iterator[None]:
        """Count a peer's call while it runs.

        Raises:
            DrainingError: If new calls are refused.
        """
        if self._is_refusing:
            raise DrainingError("this server is shutting down: try another", drop_reason="rejected-shutting-down")
        self._by_peer[peer] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]
            if not self._by_peer:
                self._idle.set()
