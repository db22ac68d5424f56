"""A client is blamed for not reading, never for a time in which this process could not have noticed that it did."""

from __future__ import annotations

import asyncio
import time

import pytest
from loraplex_gateway.requests import stall
from loraplex_gateway.requests.stall import LoopTime, StallGuard


async def write(guard: StallGuard, *, lasting_s: float) -> None:
    guard.writing()
    await asyncio.sleep(lasting_s)
    guard.written()


async def test_a_write_that_waits_too_long_is_ended() -> None:
    guard = StallGuard(0.2)

    with pytest.raises(asyncio.CancelledError):
        await write(guard, lasting_s=20)

    asyncio.current_task().uncancel()  # type: ignore[union-attr]
    assert guard.has_fired
    guard.close()


async def test_a_frozen_loop_is_not_the_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "TICK_S", 0.05)
    monkeypatch.setattr(stall, "MAX_LATE_S", 0.05)
    guard = StallGuard(0.5)
    writing = asyncio.create_task(write(guard, lasting_s=0.01))
    await asyncio.sleep(0)

    time.sleep(1.0)  # noqa: ASYNC251 (the freeze)
    await writing

    await asyncio.sleep(0.1)
    assert not guard.has_fired
    guard.close()


async def test_the_loops_clock_leaves_out_what_it_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "TICK_S", 0.05)
    monkeypatch.setattr(stall, "MAX_LATE_S", 0.05)
    clock = LoopTime.running()
    clock.watch()
    began = clock.now()

    time.sleep(1.0)  # noqa: ASYNC251 (the freeze)
    within = clock.now() - began
    await asyncio.sleep(0.02)

    assert within <= 0.2
    assert clock.now() - began < 0.5
    clock.unwatch()
