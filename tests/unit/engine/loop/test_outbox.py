"""The way out of the step loop: merging, wake-ups, backlog."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from loraplex_common.errors import InvalidParameterError, SlowConsumerError
from loraplex_engine.loop.outbox import SessionOutbox
from loraplex_engine.messages import Ended, FinishReason, PromptLogprobs, SessionEvent, StepOutputs
from loraplex_engine.step import TokenLogprobs


def outputs(step_id: int, *tokens: tuple[int, int, int], events: list[SessionEvent] | None = None) -> StepOutputs:
    """Return a step's outputs; tokens are (slot, position, token)."""
    columns = np.array(tokens, dtype=np.int32).reshape(-1, 3)
    return StepOutputs(
        step_id=step_id,
        token_slots=columns[:, 0],
        token_positions=columns[:, 1],
        token_ids=columns[:, 2],
        events=events or [],
    )


async def test_steps_that_pile_up_are_read_as_one_in_order() -> None:
    outbox = SessionOutbox(1)
    end = Ended(session_slot=2, finish_reason=FinishReason.STOP)
    outbox.put(outputs(1, (1, 0, 10), (2, 0, 20)))
    outbox.put(outputs(2, (2, 1, 21), (1, 1, 11), events=[end]))

    merged = await outbox.next()

    assert merged is not None
    assert merged.step_id == 2
    assert merged.token_slots.tolist() == [1, 2, 2, 1]
    assert merged.token_ids.tolist() == [10, 20, 21, 11]
    assert merged.events == [end]


async def test_a_put_from_another_thread_wakes_the_reader_once() -> None:
    outbox = SessionOutbox(1)
    reading = asyncio.create_task(outbox.next())
    await asyncio.sleep(0)

    def put() -> None:
        for step in range(5):
            outbox.put(outputs(step, (1, step, step)))

    thread = threading.Thread(target=put)
    thread.start()
    thread.join()
    merged = await asyncio.wait_for(reading, 10)

    assert merged is not None
    assert merged.token_ids.tolist() == [0, 1, 2, 3, 4]
    assert outbox.take() is None


async def test_closing_ends_the_reader_after_what_is_pending() -> None:
    outbox = SessionOutbox(1)
    outbox.put(outputs(1, (1, 0, 5)))
    outbox.close()

    assert await outbox.next() is not None
    assert await outbox.next() is None
    assert not outbox.put(outputs(2))


async def test_closing_with_an_error_wakes_and_raises_it() -> None:
    outbox = SessionOutbox(1)
    reading = asyncio.create_task(outbox.next())
    await asyncio.sleep(0)

    outbox.close(InvalidParameterError("slot reused"))

    with pytest.raises(InvalidParameterError, match="slot reused"):
        await asyncio.wait_for(reading, 10)


async def test_a_cancelled_read_loses_nothing() -> None:
    outbox = SessionOutbox(1)
    reading = asyncio.create_task(outbox.next())
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading

    outbox.put(outputs(1, (1, 0, 5)))

    assert await asyncio.wait_for(outbox.next(), 10) is not None


def test_too_many_unread_bytes_end_the_session() -> None:
    outbox = SessionOutbox(1, max_backlog_bytes=100)

    assert outbox.put(outputs(1, *[(1, 0, 5)] * 8))
    assert not outbox.put(outputs(2, (1, 0, 5)))

    with pytest.raises(SlowConsumerError, match="108 bytes"):
        outbox.take()


def test_probabilities_count_towards_the_backlog() -> None:
    outbox = SessionOutbox(1, max_backlog_bytes=1000)
    entry = TokenLogprobs(token_ids=np.zeros(100, np.int32), logprobs=np.zeros(100, np.float32))

    assert not outbox.put(outputs(1, events=[PromptLogprobs(session_slot=1, first=1, entries=[entry, entry])]))


def test_output_unread_for_too_long_ends_the_session() -> None:
    now_s = 0.0
    outbox = SessionOutbox(1, max_backlog_s=5.0, clock=lambda: now_s)
    outbox.put(outputs(1, (1, 0, 5)))
    now_s = 4.9
    assert outbox.put(outputs(2, (1, 1, 5)))
    now_s = 5.1

    assert not outbox.put(outputs(3, (1, 2, 5)))

    with pytest.raises(SlowConsumerError, match=r"5\.1 s"):
        outbox.take()


def test_reading_resets_the_age() -> None:
    now_s = 0.0
    outbox = SessionOutbox(1, max_backlog_s=5.0, clock=lambda: now_s)
    for step in range(10):
        now_s += 4
        assert outbox.put(outputs(step, (1, step, 5)))
        assert outbox.take() is not None


def test_a_plain_thread_waits_with_a_limit() -> None:
    outbox = SessionOutbox(1)

    assert outbox.wait(0.01) is None
    outbox.put(outputs(1, (1, 0, 5)))
    assert outbox.wait(10) is not None
