"""Does work once that several callers want at the same time, and keeps what it holds until the last is done with it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable
    from contextlib import AbstractAsyncContextManager

T = TypeVar("T")


class _Shared(Generic[T]):
    """One piece of work, in a task of its own: a user's end does not end it for the other users."""

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
            self.result.set_exception(error)  # for the users that wait

    async def end(self) -> None:
        """Release what the work holds, or cancel the work if it is not done."""
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
        """Give out the result of the work under a key; it is started if it is not under way.

        Args:
            key: Callers with equal keys share the work.
            start: Returns the work: entering it gives the result, leaving it releases what the work holds.
            name: Name of its task.
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
