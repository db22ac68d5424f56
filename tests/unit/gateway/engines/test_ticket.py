"""The buffer between an engine's session and one client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from loraplex_common.errors import DrainingError, SlowConsumerError
from loraplex_gateway.engines.ticket import MAX_UPDATE_TOKENS, EngineLostError, LocalCancelError, Ticket
from loraplex_gateway.engines.wire import EngineFinish
from loraplex_gateway.types import FinishReason, Timings

FINISH = EngineFinish(reason=FinishReason.LENGTH, stop_token_id=None, timings=Timings())


def make(*, next_sequence: int = 0, limit: int = 100) -> tuple[Ticket, list[Ticket]]:
    overflowed: list[Ticket] = []
    ticket = Ticket(7, next_sequence=next_sequence, max_buffered_tokens=limit, on_overflow=overflowed.append)
    return ticket, overflowed


def output(ticket: Ticket, *, sequence: int = 0, token_ids: tuple[int, ...] = (), **fields: Any) -> None:
    news: dict[str, Any] = {"started": None, "loading": None, "end": None, **fields}
    ticket.push_output(sequence=sequence, token_ids=token_ids, logprobs=(), **news)


async def test_tokens_gather_until_they_are_read() -> None:
    ticket, _ = make()
    for sequence, token_id in enumerate([5, 6, 7]):
        ticket.push_token(sequence, token_id)

    assert list((await ticket.next()).token_ids) == [5, 6, 7]


async def test_a_reader_wakes_up_with_the_first_news() -> None:
    ticket, _ = make()
    reading = asyncio.create_task(ticket.next())
    await asyncio.sleep(0)

    ticket.push_token(0, 5)

    assert list((await reading).token_ids) == [5]


async def test_repeated_tokens_are_dropped() -> None:
    ticket, _ = make(next_sequence=3)
    ticket.push_token(2, 99)
    ticket.push_token(3, 5)
    output(ticket, sequence=2, token_ids=(98, 97, 6))

    assert list((await ticket.next()).token_ids) == [5, 6]


@pytest.mark.parametrize("is_plain", [True, False])
async def test_a_gap_is_a_lost_engine(is_plain: bool) -> None:
    ticket, _ = make()
    if is_plain:
        ticket.push_token(1, 5)
    else:
        output(ticket, sequence=1, token_ids=(5,))

    with pytest.raises(EngineLostError, match="skipped"):
        await ticket.next()


async def test_what_came_before_a_failure_is_read_first() -> None:
    ticket, _ = make()
    ticket.push_token(0, 5)
    ticket.fail(EngineLostError("gone", had_request=True))

    assert list((await ticket.next()).token_ids) == [5]
    with pytest.raises(EngineLostError):
        await ticket.next()


async def test_what_came_with_an_engines_error_is_read_before_the_error() -> None:
    ticket, _ = make()
    ticket.push_token(0, 5)
    output(ticket, sequence=1, token_ids=(6,), end=DrainingError("draining"))

    update = await ticket.next()

    assert (list(update.token_ids), update.end, ticket.is_ended) == ([5, 6], None, True)
    with pytest.raises(DrainingError):
        await ticket.next()


async def test_the_end_comes_with_the_last_tokens() -> None:
    ticket, _ = make()
    ticket.push_token(0, 5)
    output(ticket, sequence=1, token_ids=(6,), end=FINISH)

    update = await ticket.next()

    assert (list(update.token_ids), update.end) == ([5, 6], FINISH)


async def test_what_does_not_fit_one_message_comes_with_the_next_and_the_end_comes_last() -> None:
    ticket, _ = make(limit=10**6)
    output(ticket, token_ids=tuple(range(MAX_UPDATE_TOKENS + 1)), end=FINISH)

    first, second = await ticket.next(), await ticket.next()

    assert (len(first.token_ids), first.end) == (MAX_UPDATE_TOKENS, None)
    assert (list(second.token_ids), second.end) == ([MAX_UPDATE_TOKENS], FINISH)


async def test_after_the_end_nothing_fails_any_more() -> None:
    ticket, _ = make()
    output(ticket, end=FINISH)
    ticket.fail(EngineLostError("late", had_request=True))

    assert (await ticket.next()).end == FINISH


async def test_a_full_buffer_ends_the_request_and_nobody_elses() -> None:
    ticket, overflowed = make(limit=3)
    for sequence in range(5):
        ticket.push_token(sequence, 5)

    assert overflowed == [ticket]
    with pytest.raises(SlowConsumerError):
        await ticket.next()


async def test_cancelling_wakes_the_reader() -> None:
    ticket, _ = make()
    reading = asyncio.create_task(ticket.next())
    await asyncio.sleep(0)

    ticket.cancel()

    with pytest.raises(LocalCancelError):
        await reading


async def test_a_reader_that_waits_is_not_slow_however_much_comes_at_once() -> None:
    ticket, overflowed = make(limit=3)
    reading = asyncio.create_task(ticket.next())
    await asyncio.sleep(0)

    for sequence in range(50):  # the loop has been frozen; now everything comes before the reader has its turn
        ticket.push_token(sequence, 5)

    assert len((await reading).token_ids) == 50
    assert overflowed == []


async def test_a_token_that_is_taken_wakes_no_reader() -> None:
    ticket, _ = make()
    taken: list[int] = []

    def take(token_id: int) -> bool:
        taken.append(token_id)
        return True

    ticket.take = take
    reading = asyncio.create_task(ticket.next())
    await asyncio.sleep(0)

    ticket.push_token(0, 5)
    ticket.push_token(1, 6)
    await asyncio.sleep(0)
    assert (taken, reading.done()) == ([5, 6], False)

    output(ticket, end=FINISH)
    ticket.push_token(2, 7)  # behind news that the reader has not seen
    update = await reading
    assert (taken, list(update.token_ids), update.end) == ([5, 6], [7], FINISH)


async def test_a_token_that_is_not_taken_is_the_readers_and_so_are_those_behind_it() -> None:
    ticket, _ = make()
    has_room = iter([True, False, True])
    ticket.take = lambda _: next(has_room)
    reading = asyncio.create_task(ticket.next())
    await asyncio.sleep(0)

    for sequence in range(4):
        ticket.push_token(sequence, 10 + sequence)

    assert list((await reading).token_ids) == [11, 12, 13]


async def test_a_taker_that_fails_ends_its_own_request_alone() -> None:
    ticket, _ = make()

    def take(_: int) -> bool:
        raise ZeroDivisionError

    ticket.take = take
    reading = asyncio.create_task(ticket.next())
    await asyncio.sleep(0)
    ticket.push_token(0, 5)

    with pytest.raises(ZeroDivisionError):
        await reading
