"""The time by which the running call must have its answer, known wherever it waits for something that may never come.

A client whose deadline passes gets no other information. So code that waits for another server on the client's behalf
gives up a little earlier, and the reason and the time of a useful retry still reach the client.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARGIN: Final = 0.2
"""Part of the client's time that is kept for the answer."""
MAX_MARGIN_S: Final = 1.5

_answer_by: ContextVar[float | None] = ContextVar("answer_by", default=None)


@contextmanager
def answering_within(remaining_s: float | None) -> Iterator[None]:
    """Set how long the client of the call inside the block still waits; None for no limit."""
    margin_s = 0.0 if remaining_s is None else min(MAX_MARGIN_S, MARGIN * remaining_s)
    token = _answer_by.set(None if remaining_s is None else time.monotonic() + remaining_s - margin_s)
    try:
        yield
    finally:
        _answer_by.reset(token)


@contextmanager
def given_up_in_time(error: Callable[[], Exception]) -> Iterator[None]:
    """Give up what is awaited inside the block when the call must be answered, and raise ``error()`` instead.

    It does what `asyncio.timeout` does, for blocks that are not ``async with``. Outside calls, and in calls without a
    deadline, it does nothing.
    """
    answer_by, task = _answer_by.get(), asyncio.current_task()
    if answer_by is None or task is None:
        yield
        return
    is_late = False

    def give_up() -> None:
        nonlocal is_late
        is_late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(max(0.0, answer_by - time.monotonic()), give_up)
    try:
        yield
    except asyncio.CancelledError:
        if is_late and not task.uncancel():
            is_late = False
            raise error() from None
        raise
    finally:
        timer.cancel()
        if is_late and task.cancelling():
            task.uncancel()  # the block ended at the same moment, or failed otherwise
