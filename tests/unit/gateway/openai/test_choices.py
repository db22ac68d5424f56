"""Choices side by side: what writes tokens by a short way never gets ahead of events that are still to be written."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from loraplex_gateway.openai.choices import Choices

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

EARLY = (2, 1, 1)
"""Events that each choice has before the first is read: one more than the queue has places for."""
NUM_EVENTS = 6


class Rounds:
    """A core of which each choice has events 0, 1, .., each when it is told to."""

    def __init__(self) -> None:
        self.begins = [[asyncio.Event() for _ in range(NUM_EVENTS)] for _ in EARLY]

    async def generate(self, request: Any, **_: object) -> AsyncGenerator[Any, None]:
        for number, begins in enumerate(self.begins[request]):
            await begins.wait()
            yield number


async def test_no_short_way_is_open_while_an_event_waits_to_be_written() -> None:
    """The last choice's event had to wait for a place; the reader finds the queue empty before that choice has its turn."""
    core, nothing = Rounds(), cast("Any", None)
    choices = Choices(cast("Any", core), [nothing] * len(EARLY), caller=nothing, quota=nothing)
    found: list[tuple[int, Any]] = []

    async def read() -> None:
        async for item in choices._merged(len(EARLY)):
            found.append(item)

    for begins, count in zip(core.begins, EARLY, strict=True):
        for event in begins[:count]:
            event.set()
    tasks = [asyncio.create_task(choices._run(number, cast("Any", number), None)) for number in range(len(EARLY))]
    for _ in range(5):
        await asyncio.sleep(0)
    assert choices._queue.full()
    reader = asyncio.create_task(read())
    for _ in range(8):
        await asyncio.sleep(0)
        assert not choices.is_waiting or choices._queue.empty()

    for event in (event for begins in core.begins for event in begins):
        event.set()
    await asyncio.gather(reader, *tasks)
    for number in range(len(EARLY)):
        assert [event for choice, event in found if choice == number] == list(range(NUM_EVENTS))
