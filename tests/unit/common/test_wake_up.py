from __future__ import annotations

import asyncio

from loraplex_common.wake_up import WakeUp


async def test_a_change_wakes_every_waiting_task() -> None:
    wake_up = WakeUp()
    waiting = [asyncio.create_task(wake_up.next.wait()) for _ in range(3)]
    await asyncio.sleep(0)

    wake_up.notify()

    async with asyncio.timeout(5):
        assert await asyncio.gather(*waiting) == [True, True, True]


async def test_a_change_between_taking_the_event_and_waiting_for_it_is_not_lost() -> None:
    wake_up = WakeUp()
    taken = wake_up.next

    wake_up.notify()

    async with asyncio.timeout(5):
        await taken.wait()


def test_an_event_taken_after_a_change_is_not_set_by_it() -> None:
    wake_up = WakeUp()

    wake_up.notify()

    assert not wake_up.next.is_set()


async def test_waiting_for_a_condition_ends_with_the_change_that_makes_it_true() -> None:
    wake_up, seen = WakeUp(), [0]
    waiting = asyncio.create_task(wake_up.wait_until(lambda: seen[0] >= 2))
    was_done = []
    for _ in range(2):
        await asyncio.sleep(0)
        was_done.append(waiting.done())
        seen[0] += 1
        wake_up.notify()

    async with asyncio.timeout(5):
        await waiting

    assert was_done == [False, False]


async def test_waiting_for_what_is_true_already_returns_at_once() -> None:
    async with asyncio.timeout(5):
        await WakeUp().wait_until(lambda: True)
