"""A background task that dies takes its service along, loudly."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from loraplex_common.tasks import BackgroundTaskError, Supervisor, cancel_and_wait, deliver_cancellation
from structlog.testing import capture_logs

TIMEOUT_S = 20.0


async def fail() -> None:
    raise KeyError("lost")


async def return_early() -> None:
    return None


async def run_on(ended: asyncio.Event) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()


async def test_a_task_that_raises_ends_run_until_with_its_cause() -> None:
    async with Supervisor() as supervisor:
        supervisor.spawn(fail(), name="lease")

        with capture_logs() as logs, pytest.raises(BackgroundTaskError, match="'lease' ended") as caught:
            await asyncio.wait_for(supervisor.run_until(asyncio.Event()), TIMEOUT_S)

    assert isinstance(caught.value.__cause__, KeyError)
    assert logs[0]["task"] == "lease"


async def test_a_task_that_just_returns_ends_run_until_too() -> None:
    async with Supervisor() as supervisor:
        supervisor.spawn(return_early(), name="watch")

        with pytest.raises(BackgroundTaskError, match="'watch' ended"):
            await asyncio.wait_for(supervisor.run_until(asyncio.Event()), TIMEOUT_S)


async def test_a_failure_before_run_until_is_not_forgotten() -> None:
    async with Supervisor() as supervisor:
        task = supervisor.spawn(fail(), name="early")
        await asyncio.wait({task})

        with pytest.raises(BackgroundTaskError, match="'early' ended"):
            await asyncio.wait_for(supervisor.run_until(asyncio.Event()), TIMEOUT_S)


async def test_a_task_spawned_once_may_return_but_not_raise() -> None:
    async with Supervisor() as supervisor:
        stop = asyncio.Event()
        await asyncio.wait({supervisor.spawn_once(return_early(), name="warm-up")})
        stop.set()
        await asyncio.wait_for(supervisor.run_until(stop), TIMEOUT_S)

        supervisor.spawn_once(fail(), name="hint")
        with pytest.raises(BackgroundTaskError, match="'hint' ended"):
            await asyncio.wait_for(supervisor.run_until(asyncio.Event()), TIMEOUT_S)


async def test_leaving_the_block_ends_every_task() -> None:
    ended = [asyncio.Event(), asyncio.Event()]
    async with Supervisor() as supervisor:
        for event in ended:
            supervisor.spawn(run_on(event), name="loop")
        stop = asyncio.Event()
        stop.set()
        await asyncio.wait_for(supervisor.run_until(stop), TIMEOUT_S)
        await asyncio.sleep(0)

    assert all(event.is_set() for event in ended)


async def test_a_failure_while_stopping_is_logged_not_lost() -> None:
    async def stumble() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("in cleanup")

    task = asyncio.create_task(stumble(), name="cleanup")
    await asyncio.sleep(0)

    with capture_logs() as logs:
        await cancel_and_wait(task)

    assert (logs[0]["task"], str(logs[0]["exc_info"])) == ("cleanup", "in cleanup")


async def test_a_swallowed_cancellation_is_delivered() -> None:
    async def swallows() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        while True:
            deliver_cancellation()
            await asyncio.sleep(0)

    task = asyncio.create_task(swallows())
    await asyncio.sleep(0)
    task.cancel()

    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await task
