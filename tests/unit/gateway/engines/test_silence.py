"""Which silence of a peer counts."""

from __future__ import annotations

import asyncio
import time

from loraplex_gateway.engines.silence import wait_for_silence

LIMIT_S = 0.4


async def test_a_peer_that_says_nothing_is_silent_after_the_limit() -> None:
    began = time.monotonic()

    silent_s = await asyncio.wait_for(wait_for_silence(lambda: 0, lambda: LIMIT_S), 10)

    assert silent_s >= LIMIT_S
    assert time.monotonic() - began >= LIMIT_S * 0.9


async def test_a_peer_that_speaks_now_and_then_is_not() -> None:
    num_heard = 0
    waiting = asyncio.create_task(wait_for_silence(lambda: num_heard, lambda: LIMIT_S))
    for _ in range(12):
        await asyncio.sleep(LIMIT_S / 4)
        num_heard += 1

    assert not waiting.done()
    waiting.cancel()


async def test_a_loop_that_was_busy_itself_does_not_blame_its_peer() -> None:
    waiting = asyncio.create_task(wait_for_silence(lambda: 0, lambda: 2.0))
    await asyncio.sleep(0.05)

    time.sleep(2.5)  # noqa: ASYNC251 - this is the busy loop
    await asyncio.sleep(0.3)

    assert not waiting.done()
    waiting.cancel()
