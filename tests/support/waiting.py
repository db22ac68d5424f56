"""Waits for what another process or thread is about to do, with a deadline instead of a guess."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


async def eventually(condition: Callable[[], Any], *, timeout_s: float = 20.0, what: str = "") -> Any:
    """Evaluate a condition (plain or async) every 10 ms until it is true and return its value.

    Raises:
        AssertionError: If it is still false after ``timeout_s``; the message has the last value.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        result = await value if inspect.isawaitable(value) else value
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"{what or inspect.getsource(condition).strip()} is still {result!r}")
        await asyncio.sleep(0.01)


def eventually_sync(condition: Callable[[], bool], *, timeout_s: float = 20.0, what: str) -> None:
    """Evaluate a condition every 50 ms until it is true.

    Raises:
        AssertionError: If it is still false after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.05)
