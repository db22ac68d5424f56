"""The order in which messages leave for an engine."""

from __future__ import annotations

import asyncio

from loraplex_adapter_store.attach.messages import Ack, Drop, Filled, Written
from loraplex_adapter_store.attach.outbox import LENGTH, Outbox


async def test_pages_gather_until_there_are_enough_of_an_image() -> None:
    outbox = Outbox(written_at_once=3)
    getting = asyncio.create_task(outbox.get())

    outbox.note_written("a", 0, (4, 1))
    outbox.note_written("b", 0, (7,))
    await asyncio.sleep(0)
    assert not getting.done()
    outbox.note_written("a", 0, (2,))

    assert await getting == Written("a", 0, (4, 1, 2))


async def test_pages_that_were_written_are_named_before_the_next_message() -> None:
    outbox = Outbox(written_at_once=3)

    outbox.note_written("a", 1, (0,))
    await outbox.put(Filled("a", 1, "root"))

    assert await outbox.get() == Written("a", 1, (0,))
    assert await outbox.get() == Filled("a", 1, "root")


async def test_pages_and_acknowledgements_need_no_room_in_the_queue() -> None:
    outbox = Outbox(written_at_once=1)
    for number in range(LENGTH):
        await outbox.put(Drop(str(number)))

    outbox.note_written("a", 0, (0,))
    outbox.acknowledge(Ack(5, 1))

    assert await outbox.get() == Ack(5, 1)
    assert await outbox.get() == Written("a", 0, (0,))
    assert await outbox.get() == Drop("0")
