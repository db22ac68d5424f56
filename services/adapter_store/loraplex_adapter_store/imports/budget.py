"""Limits on what imports may hold at once: bytes in memory, and their number."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import SaturatedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

WAIT_S: Final = 30.0
NO_ROOM: Final = "other imports hold all memory for imports"


class Arrival:
    """The memory of one arriving checkpoint: as much as has arrived."""

    def __init__(self, budget: ImportBudget) -> None:
        self.num_bytes = 0
        self.wants_bytes = 0
        self.is_given_up = False
        self._budget = budget

    async def take(self, num_bytes: int) -> None:
        """Hold more, once there is room.

        Raises:
            SaturatedError: If there is no room within `WAIT_S`, too many imports wait for some, or arrivals wait for
                each other and this is the last of them.
        """
        await self._budget.grow(self, num_bytes)

    def taker(self) -> Callable[[int], None]:
        """Return a `take` for threads, which blocks; usable while this event loop runs."""
        loop = asyncio.get_running_loop()

        def take(num_bytes: int) -> None:
            asyncio.run_coroutine_threadsafe(self.take(num_bytes), loop).result()

        return take


class ImportBudget:
    """Admission of imports.

    Args:
        max_bytes: Bytes of checkpoints in memory at once.
        max_running: Imports at work at once.
        max_pending: Imports that may wait for their turn in addition.
    """

    def __init__(self, *, max_bytes: int, max_running: int, max_pending: int) -> None:
        self._max_bytes = max_bytes
        self._free_bytes = max_bytes
        self._free_places = max_running
        self._max_pending = max_pending
        self._pending = 0
        self._arrivals: list[Arrival] = []  # in the order in which they began
        self._changed = asyncio.Condition()

    @property
    def held_bytes(self) -> int:
        """Bytes of checkpoints in memory."""
        return self._max_bytes - self._free_bytes

    def check_pending(self) -> None:
        """Raise `SaturatedError` if too many imports wait already."""
        if self._pending >= self._max_pending:
            raise SaturatedError(f"{self._pending} imports are waiting already", retry_after_s=5.0)

    @asynccontextmanager
    async def fetching(self) -> AsyncIterator[None]:
        """Count an import as waiting while its checkpoint arrives; a slow arrival takes no place from other imports.

        Raises:
            SaturatedError: If too many imports wait.
        """
        self.check_pending()
        self._pending += 1
        try:
            yield
        finally:
            self._pending -= 1

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place among the running imports, once there is one."""
        self.check_pending()
        self._pending += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._free_places > 0)
                self._free_places -= 1
        finally:
            self._pending -= 1
        try:
            yield
        finally:
            async with self._changed:
                self._free_places += 1
                self._changed.notify_all()

    @asynccontextmanager
    async def arrival(self, num_bytes: int = 0) -> AsyncIterator[Arrival]:
        """Let a checkpoint in; it takes room as its bytes arrive, and none for bytes that are only announced.

        Args:
            num_bytes: Announced size; None if unknown.

        Raises:
            SaturatedError: If it can never fit.
        """
        if num_bytes > self._max_bytes:
            raise SaturatedError(f"{num_bytes} bytes exceed what imports may hold at once, {self._max_bytes} bytes")
        arrival = Arrival(self)
        self._arrivals.append(arrival)
        try:
            yield arrival
        finally:
            async with self._changed:
                arrival.is_given_up = True  # a thread may still ask for more
                self._arrivals.remove(arrival)
                self._free_bytes += arrival.num_bytes
                self._changed.notify_all()

    async def grow(self, arrival: Arrival, num_bytes: int) -> None:
        """See `Arrival.take`."""
        async with self._changed:
            if sum(other.wants_bytes > 0 for other in self._arrivals) >= self._max_pending:
                raise SaturatedError(NO_ROOM, retry_after_s=5.0)  # each waiting import holds a part without room
            arrival.wants_bytes = num_bytes
            try:
                self._break_deadlock()
                async with asyncio.timeout(WAIT_S):
                    await self._changed.wait_for(lambda: arrival.is_given_up or self._free_bytes >= num_bytes)
            except TimeoutError:
                raise SaturatedError(NO_ROOM, retry_after_s=5.0) from None
            finally:
                arrival.wants_bytes = 0
            if arrival.is_given_up:
                raise SaturatedError(NO_ROOM, retry_after_s=5.0)
            self._free_bytes -= num_bytes
            arrival.num_bytes += num_bytes

    def _break_deadlock(self) -> None:
        """Give up the last arrival if all that hold room wait for more, as none of them would ever end."""
        holding = [arrival for arrival in self._arrivals if arrival.num_bytes and not arrival.is_given_up]
        if not holding:
            return
        if all(arrival.wants_bytes > self._free_bytes for arrival in holding):
            holding[-1].is_given_up = True
            self._changed.notify_all()

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if room or places are held although no import runs."""
        if self._free_bytes != self._max_bytes or self._pending:
            raise RuntimeError(f"imports hold {self._max_bytes - self._free_bytes} bytes, {self._pending} wait")
