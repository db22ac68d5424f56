"""Bytes that several pieces of work may hold together; those that find no room wait in order."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class ByteBudget:
    """Admits work by its bytes. One that needs more than all of them is admitted alone.

    Args:
        max_bytes: Bytes of all work together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._queue = asyncio.Lock()  # fair: a large piece of work is not overtaken for ever
        self._changed = asyncio.Event()
        self.used_bytes = 0

    @asynccontextmanager
    async def hold(self, num_bytes: int) -> AsyncIterator[None]:
        """Hold bytes for the block, once there is room for them."""
        async with self._queue:
            while self.used_bytes and self.used_bytes + num_bytes > self._max_bytes:
                self._changed.clear()
                await self._changed.wait()
            self.used_bytes += num_bytes
        try:
            yield
        finally:
            self.used_bytes -= num_bytes
            self._changed.set()
