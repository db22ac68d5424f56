"""A reader of the fleet gets everything first, engine by engine, and loses nothing of what happens meanwhile."""

from __future__ import annotations

import asyncio
import itertools

from loraplex.v1 import fleet_pb2
from loraplex_gateway.fleet.news import News
from loraplex_gateway.fleet.watch import MAX_BACKLOG, FleetReader

SOON_S = 5.0


def news(engine_id: str, *, gone: bool = False, passed_over: str = "") -> News:
    return News(fleet_pb2.WatchFleetResponse(engine_id=engine_id, gone=gone, passed_over=passed_over))


class Fleet:
    """Engines that answer for themselves, and the order in which they were asked."""

    def __init__(self, *engine_ids: str) -> None:
        self.engine_ids = list(engine_ids)
        self.asked: list[str] = []
        self.reader = FleetReader(lambda: list(self.engine_ids), self._snapshot)

    async def _snapshot(self, engine_id: str) -> News | None:
        self.asked.append(engine_id)
        return news(engine_id, passed_over="all") if engine_id in self.engine_ids else None

    async def take(self) -> list[tuple[str, str]]:
        """Return the next news: engine, and `gone`, `all` or what the news said."""
        found = await self.reader.take(SOON_S)
        assert found is not None
        return [(each.message.engine_id, "gone" if each.message.gone else each.message.passed_over) for each in found]


async def test_everything_is_told_one_engine_at_a_time_and_others_run_in_between() -> None:
    fleet = Fleet("a", "b", "c")
    turns = itertools.count()

    async def other() -> None:
        while True:
            next(turns)
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    await asyncio.sleep(0)
    seen = []
    for expected in ("a", "b", "c"):
        before = next(turns)
        assert await fleet.take() == [(expected, "all")]
        assert next(turns) > before + 1, "nothing else ran between two engines' snapshots"
        seen.append(expected)
        assert fleet.asked == seen
    beside.cancel()


async def test_a_change_of_an_engine_that_is_still_to_be_told_of_is_not_told_twice() -> None:
    fleet = Fleet("a", "b")
    await fleet.take()
    fleet.reader.put(news("b", passed_over="later"))
    fleet.reader.put(news("a", passed_over="later"))

    assert await fleet.take() == [("a", "later"), ("b", "all")]
    assert await fleet.reader.take(0.01) == []


async def test_what_happens_while_all_of_an_engine_is_collected_is_told_behind_it() -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slowly(engine_id: str) -> News:
        begun.set()
        await may_end.wait()
        return news(engine_id, passed_over="all")

    reader = FleetReader(lambda: ["a"], slowly)
    taking = asyncio.create_task(reader.take(SOON_S))
    await begun.wait()
    reader.put(news("a", passed_over="later"))
    reader.put(news("a", gone=True))
    may_end.set()

    first, second = await taking, await reader.take(SOON_S)
    assert first is not None
    assert second is not None
    assert [each.message.passed_over for each in first] == ["all"]
    assert [(each.message.passed_over, each.message.gone) for each in second] == [("later", False), ("", True)]


async def test_an_engine_that_goes_before_it_was_told_of_is_only_said_to_be_gone() -> None:
    fleet = Fleet("a", "b")
    await fleet.take()
    fleet.engine_ids.remove("b")
    fleet.reader.put(news("b", gone=True))

    assert await fleet.take() == [("b", "gone")]
    assert await fleet.reader.take(0.01) == []


async def test_a_reader_that_is_far_behind_gets_all_engines_anew_and_learns_which_are_gone() -> None:
    fleet = Fleet("a", "b")
    await fleet.take()
    await fleet.take()
    for _ in range(MAX_BACKLOG):
        fleet.reader.put(news("a", passed_over="change"))
    fleet.engine_ids.remove("b")
    fleet.reader.put(news("b", gone=True))
    fleet.reader.put(news("a", passed_over="change"))

    assert await fleet.take() == [("b", "gone"), ("a", "all")]
    assert await fleet.reader.take(0.01) == []


async def test_a_reader_that_is_closed_while_engines_are_still_to_be_told_of_ends() -> None:
    fleet = Fleet("a", "b")
    taking = asyncio.create_task(fleet.take())
    await asyncio.sleep(0)
    fleet.reader.close()

    assert await taking == [("a", "all")]
    assert await fleet.reader.take(SOON_S) is None
