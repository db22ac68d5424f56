"""Gives turns at a bounded resource to the transfers that are needed first."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_adapter_store.attach.transfer import Transfer


class UrgencyGate:
    """Lets a few transfers in at a time: wanted ones first, by deadline; then foreseen ones by time; equals by arrival.

    A transfer's urgency may change while it waits, so it is read when a turn becomes free.

    Args:
        limit: Most transfers inside.
    """

    def __init__(self, limit: int) -> None:
        self._num_free = limit
        self._waiting: list[tuple[Transfer, asyncio.Future[None]]] = []  # by arrival

    @asynccontextmanager
    async def turn(self, transfer: Transfer) -> AsyncIterator[None]:
        """Wait for a turn and keep it for the block."""
        if self._num_free:
            self._num_free -= 1
        else:
            await self._wait(transfer)
        try:
            yield
        finally:
            self._give_away()

    async def _wait(self, transfer: Transfer) -> None:
        entry = (transfer, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            if not entry[1].cancelled():
                self._give_away()  # cancelled after it had been given a turn
            raise

    def _give_away(self) -> None:
        # A transfer that was cancelled in this turn of the event loop has not run to leave the queue yet.
        self._waiting = [entry for entry in self._waiting if not entry[1].cancelled()]
        if not self._waiting:
            self._num_free += 1
            return
        index = min(range(len(self._waiting)), key=lambda i: self._waiting[i][0].urgency)
        _, future = self._waiting.pop(index)
        future.set_result(None)
