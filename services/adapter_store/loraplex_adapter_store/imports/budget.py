"""Bounds what imports may hold at once: their bytes in memory and their number."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import SaturatedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WAIT_S: Final = 30.0


class ImportBudget:
    """Admission of imports.

    Args:
        max_bytes: Bytes of checkpoints in memory at once.
        max_running: Imports at work at once.
        max_pending: Imports that may wait for their turn besides those.
    """

    def __init__(self, *, max_bytes: int, max_running: int, max_pending: int) -> None:
        self._max_bytes = max_bytes
        self._free_bytes = max_bytes
        self._free_places = max_running
        self._max_pending = max_pending
        self._pending = 0
        self._changed = asyncio.Condition()

    def check_pending(self) -> None:
        """Raise `SaturatedError` if one more import would wait too long a line."""
        if self._pending >= self._max_pending:
            raise SaturatedError(f"{self._pending} imports are waiting already", retry_after_s=5.0)

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
    async def room(self, num_bytes: int) -> AsyncIterator[None]:
        """Hold room for a checkpoint in memory, once there is some.

        Raises:
            SaturatedError: If it never fits, or not within `WAIT_S`.
        """
        if num_bytes > self._max_bytes:
            raise SaturatedError(f"{num_bytes} bytes exceed what imports may hold at once, {self._max_bytes} bytes")
        try:
            async with asyncio.timeout(WAIT_S), self._changed:
                await self._changed.wait_for(lambda: self._free_bytes >= num_bytes)
                self._free_bytes -= num_bytes
        except TimeoutError:
            raise SaturatedError("other imports hold all memory for imports", retry_after_s=5.0) from None
        try:
            yield
        finally:
            async with self._changed:
                self._free_bytes += num_bytes
                self._changed.notify_all()

    def check_integrity(self) -> None:
        """Raise `RuntimeError` if something is still held although no import runs."""
        if self._free_bytes != self._max_bytes or self._pending:
            raise RuntimeError(f"imports hold {self._max_bytes - self._free_bytes} bytes, {self._pending} wait")
