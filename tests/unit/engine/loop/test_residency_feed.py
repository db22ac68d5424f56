from __future__ import annotations

import asyncio

import pytest
from loraplex_common.errors import SequenceGapError
from loraplex_engine.loop.residency_feed import ResidencyFeed
from loraplex_engine.messages import ResidencyChanged, ResidencyState

RESIDENT, DRAINING = ResidencyState.RESIDENT, ResidencyState.DRAINING
IN_ARENA, ABSENT, WANTED = ResidencyState.IN_ARENA, ResidencyState.ABSENT, ResidencyState.WANTED


def changed(sequence: int, digest: str, state: ResidencyState) -> ResidencyChanged:
    return ResidencyChanged(
        sequence=sequence,
        digest=digest,
        state=state,
        generation=1,
        num_leases=0,
        num_pages=1,
        is_pinned=False,
        max_rank=8,
    )


def make_feed(*changes: tuple[str, ResidencyState], capacity: int = 100) -> ResidencyFeed:
    feed = ResidencyFeed(capacity)
    for sequence, (digest, state) in enumerate(changes, start=1):
        feed.append(changed(sequence, digest, state))
    return feed


def test_resident_are_the_adapters_that_can_be_leased() -> None:
    feed = make_feed(("a", RESIDENT), ("b", IN_ARENA), ("c", RESIDENT), ("c", DRAINING), ("d", RESIDENT), ("d", ABSENT))

    assert feed.resident == {"a"}


def test_the_version_rises_only_when_the_resident_adapters_change() -> None:
    feed = make_feed(("a", RESIDENT), ("b", IN_ARENA))
    before = feed.resident_version

    feed.append(changed(3, "a", RESIDENT))  # e.g. its first lease
    unchanged = feed.resident_version
    feed.append(changed(4, "a", IN_ARENA))

    assert (unchanged, feed.resident_version) == (before, before + 1)


def test_a_reader_too_far_behind_gets_a_gap() -> None:
    feed = make_feed(*[("a", RESIDENT), ("a", IN_ARENA)] * 5, capacity=4)

    assert [event.sequence for event in feed.since(6)] == [7, 8, 9, 10]
    with pytest.raises(SequenceGapError, match="list again"):
        feed.since(5)


def test_a_position_of_another_engines_life_is_a_gap() -> None:
    with pytest.raises(SequenceGapError):
        make_feed(("a", RESIDENT)).since(2)


def test_a_lost_event_is_noticed() -> None:
    feed = make_feed(("a", RESIDENT))

    with pytest.raises(ValueError, match="lost"):
        feed.append(changed(3, "a", ABSENT))


def test_held_are_the_adapters_in_arena_or_on_the_device() -> None:
    feed = make_feed(("a", RESIDENT), ("b", WANTED), ("c", IN_ARENA), ("d", IN_ARENA), ("d", ABSENT))

    assert {event.digest for event in feed.held} == {"a", "c"}
    assert feed.in_state(WANTED) == ["b"]


async def test_every_waiter_hears_of_a_change() -> None:
    feed = make_feed(("a", RESIDENT))
    waiters = [asyncio.create_task(feed.wait_beyond(1)) for _ in range(3)]
    await asyncio.sleep(0)

    feed.append(changed(2, "a", ABSENT))

    await asyncio.wait_for(asyncio.gather(*waiters), 5)
