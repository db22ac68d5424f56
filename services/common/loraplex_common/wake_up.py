"""One event loop's wake-up: every task that waits is woken by the next change, and by no earlier one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class WakeUp:
    """Wakes all waiting tasks at each change.

    A single `asyncio.Event` that is set and cleared loses a change that comes between two waits. Here each change has an
    event of its own: a task takes `next`, looks at the state, and waits for the event that it took. Not thread-safe.
    """

    def __init__(self) -> None:
        self._next = asyncio.Event()

    @property
    def next(self) -> asyncio.Event:
        """The event that the next change sets; take it before looking at the state."""
        return self._next

    def notify(self) -> None:
        """Wake all waiting tasks; a task that starts to wait afterwards waits for the next change."""
        self._next.set()
        self._next = asyncio.Event()

    async def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Return once a condition holds; it is checked now and after each change."""
        while not is_true():
            await self._next.wait()
