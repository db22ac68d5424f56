"""Functions that run in threads for one purpose, and an end after which none of them runs."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor


class ThreadWork:
    """Work of one owner on a shared pool of threads; the owner starts it from one thread at a time.

    Args:
        executor: The pool.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._futures: list[Future[None]] = []
        self._waits: list[asyncio.Future[None]] = []

    def start(self, function: Callable[..., None], *args: Any) -> Future[None]:
        """Run a function in a thread; what it raises, `done` raises too."""
        future = self._executor.submit(function, *args)
        self._futures.append(future)
        return future

    async def run(self, function: Callable[..., None], *args: Any) -> None:
        """Run a function in a thread and wait for it; called on the event loop."""
        self._waits.append(asyncio.wrap_future(self.start(function, *args)))
        await self._waits[-1]

    async def done(self) -> None:
        """Wait for all that was started; raise what the first failure raised, at once."""
        self._waits = [asyncio.wrap_future(future) for future in self._futures]
        if self._waits:
            done, _ = await asyncio.wait(self._waits, return_when=asyncio.FIRST_EXCEPTION)
            for each in done:
                each.result()

    async def quiet(self) -> None:
        """Wait, even if cancelled, until no function runs; those that have not begun do not begin."""
        for future in self._futures:
            future.cancel()
        running = [future for future in self._futures if not future.done()]
        if running:
            # A thread of its own: those of the pool may all be busy, and a cancelled wait must go on waiting.
            waiting = asyncio.ensure_future(asyncio.to_thread(wait, running))
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError:
                await waiting
                raise
        for each in self._waits:
            if not each.cancelled() and each.done():
                each.exception()  # a failure after the first is no news
