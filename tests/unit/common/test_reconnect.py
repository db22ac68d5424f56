from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest
from loraplex_common.reconnect import keep_connected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class EndOfTestError(Exception):
    """Ends a loop that never ends by itself."""


def peer(*answers: bool) -> Callable[[], Awaitable[bool]]:
    """Return a connection that works or not, as told, and then ends the loop."""
    left = list(answers)

    async def hold() -> bool:
        if not left:
            raise EndOfTestError
        return left.pop(0)

    return hold


async def pauses_after(monkeypatch: pytest.MonkeyPatch, *answers: bool) -> list[float]:
    """Return the pauses of a loop whose dice always give the longest one."""
    pauses: list[float] = []

    async def note(pause_s: float) -> None:
        pauses.append(pause_s)

    monkeypatch.setattr(asyncio, "sleep", note)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    with pytest.raises(EndOfTestError):
        await keep_connected(peer(*answers), first_pause_s=1.0, max_pause_s=5.0)
    return pauses


async def test_pauses_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await pauses_after(monkeypatch, False, False, False, False, False) == [1.0, 2.0, 4.0, 5.0, 5.0]


async def test_a_connection_that_worked_starts_the_pauses_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await pauses_after(monkeypatch, False, False, True, False) == [1.0, 2.0, 1.0, 2.0]


async def test_half_of_a_pause_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[tuple[float, float]] = []

    def in_the_middle(low: float, high: float) -> float:
        bounds.append((low, high))
        return (low + high) / 2

    async def no_pause(pause_s: float) -> None:
        assert pause_s == 0.75

    monkeypatch.setattr(asyncio, "sleep", no_pause)
    monkeypatch.setattr(random, "uniform", in_the_middle)

    with pytest.raises(EndOfTestError):
        await keep_connected(peer(True), first_pause_s=1.0, max_pause_s=5.0)

    assert bounds == [(0.5, 1.0)]
