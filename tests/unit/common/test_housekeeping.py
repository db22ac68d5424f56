"""What goes on for ever goes on, and does not fill the disk with the news that it cannot."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import structlog
from loraplex_common import housekeeping
from loraplex_common.errors import StoreUnavailableError
from loraplex_common.housekeeping import REPEAT_S, Trouble, keep_doing
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable


def failing(times: int, error: Exception) -> tuple[Callable[[], object], list[int]]:
    done: list[int] = []

    async def turn() -> None:
        done.append(1)
        if len(done) <= times:
            raise error
        await asyncio.sleep(3600)

    return turn, done


@pytest.mark.parametrize("error", [StoreUnavailableError("MISCONF"), KeyError("blob")])
async def test_no_failure_ends_what_goes_on_for_ever(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "FIRST_PAUSE_S", 0.001)
    turn, done = failing(4, error)
    with structlog.testing.capture_logs() as lines:
        task = asyncio.create_task(keep_doing(turn, name="collecting"))  # type: ignore[arg-type]
        await eventually(lambda: len(done) == 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert [line["log_level"] for line in lines] == ["warning"]


def test_trouble_that_lasts_is_said_once_a_minute_with_its_count_and_once_when_it_is_over() -> None:
    now = 0.0
    trouble = Trouble(clock=lambda: now)
    with structlog.testing.capture_logs() as lines:
        for now in range(int(2 * REPEAT_S) + 1):  # noqa: B007 -- the clock reads it
            trouble.warn("disk full")
        trouble.over("room again")
        trouble.over("room again")

    assert [(line["event"], line.get("times_since")) for line in lines] == [
        ("disk full", None),
        ("disk full", 60),
        ("disk full", 60),
        ("room again", None),
    ]
