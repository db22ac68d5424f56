"""Work that several callers want at the same time is done once, and what it holds is kept until the last is done with it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable
    from contextlib import AbstractAsyncContextManager

T = TypeVar("T")


class _Shared(Generic[T]):
    """One piece of work, in a task of its own: none of its users' ends ends it for the others."""

    def __init__(self, work: AbstractAsyncContextManager[T], name: str) -> None:
        self.num_users = 0
        self.result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._is_unused = asyncio.Event()
        self._task = asyncio.create_task(self._run(work), name=name)

    async def _run(self, work: AbstractAsyncContextManager[T]) -> None:
        try:
            async with work as result:
                self.result.set_result(result)
                await self._is_unused.wait()
        except asyncio.CancelledError:
            self.result.cancel()
            raise
        except Exception as error:
            if self.result.done():
                raise
            self.result.set_exception(error)  # for whoever waits

    async def end(self) -> None:
        """Let go of what the work holds, or give it up if it is not done."""
        self._is_unused.set()
        if not self.result.done():
            self._task.cancel()
        await asyncio.wait([self._task])


class SharedWork(Generic[T]):
    """Pieces of work under way, by their keys."""

    def __init__(self) -> None:
        self._shared: dict[Hashable, _Shared[T]] = {}

    @asynccontextmanager
    async def use(
        self, key: Hashable, start: Callable[[], AbstractAsyncContextManager[T]], *, name: str
    ) -> AsyncIterator[T]:
        """Give out the result of work that is under way under a key, else of work that is started now.

        Args:
            key: Equal keys share.
            start: Returns the work: entering it gives the result, and leaving it lets go of what that holds.
            name: Of its task.
        """
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = _Shared(start(), name)
        shared.num_users += 1
        try:
            try:
                result = await asyncio.shield(shared.result)
            finally:
                is_last = shared.num_users == 1
                if self._shared.get(key) is shared and (shared.result.done() or is_last):
                    del self._shared[key]
            yield result
        finally:
            shared.num_users -= 1
            if not shared.num_users:
                await shared.end()
