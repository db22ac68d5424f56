"""Background tasks whose death is always noticed."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraplex_common.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

_log = get_logger()


class BackgroundTaskError(RuntimeError):
    """A background task ended although its service still runs; its exception, if any, is the cause."""


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they are gone; their exceptions are logged, not raised."""
    for task in tasks:
        task.cancel()
    for task, outcome in zip(tasks, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
        if isinstance(outcome, Exception):
            _log.error("task failed while it was stopped", task=task.get_name(), exc_info=outcome)


def deliver_cancellation() -> None:
    """Raise if this task's cancellation was swallowed; endless loops over Valkey call it after each round trip.

    Python 3.11's `asyncio.wait_for`, through which redis-py sends, swallows a cancellation that arrives together with
    its result: the loop would go on, and the task that cancelled it would wait for ever.

    Raises:
        asyncio.CancelledError: If it was swallowed.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@contextmanager
def heard_cancellation() -> Iterator[None]:
    """Deliver a cancellation that arrives inside the block and that the block swallows; see `deliver_cancellation`.

    A cancellation from before the block is left alone, so that a cancelled task's clean-up may use such blocks too.

    Raises:
        asyncio.CancelledError: If it was swallowed.
    """
    task = asyncio.current_task()
    num_before = 0 if task is None else task.cancelling()
    yield
    if task is not None and task.cancelling() > num_before:
        raise asyncio.CancelledError


class Supervisor:
    """Owns a service's background tasks: each runs until `close`; a task that ends earlier crashes the service.

    Used as an async context manager, or with `close` in a ``finally``::

        async with Supervisor() as supervisor:
            supervisor.spawn(renew_lease(), name="lease")
            await supervisor.run_until(stop)
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed: asyncio.Future[None] | None = None

    def spawn(self, coroutine: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run a coroutine that is not meant to return."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def spawn_once(self, coroutine: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Run a coroutine that may return, but not raise."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._completed)
        return task

    async def run_until(self, stop: asyncio.Event) -> None:
        """Wait until ``stop`` is set.

        Raises:
            BackgroundTaskError: If a task ends first.
        """
        waiter = asyncio.create_task(stop.wait(), name="stop")
        try:
            futures: set[asyncio.Future[Any]] = {waiter, self._failure()}
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if self._failure().done():
                self._failure().result()
        finally:
            await cancel_and_wait(waiter)

    async def close(self) -> None:
        """Cancel all tasks and wait for them."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.remove_done_callback(self._ended)
            task.remove_done_callback(self._completed)
        await cancel_and_wait(*tasks)

    async def __aenter__(self) -> Supervisor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _failure(self) -> asyncio.Future[None]:
        if self._failed is None:
            self._failed = asyncio.get_running_loop().create_future()
        return self._failed

    def _completed(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._tasks.discard(task)
            return
        self._ended(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        cause = None if task.cancelled() else task.exception()
        error = BackgroundTaskError(f"background task {task.get_name()!r} ended")
        error.__cause__ = cause
        _log.error("background task ended", task=task.get_name(), exc_info=cause)
        if not self._failure().done():
            self._failure().set_exception(error)
            self._failure().exception()  # marks it as seen: `run_until` raises it
