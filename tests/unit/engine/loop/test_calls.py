"""A call that only begins something: its failure ends the future of what it begins, unless that has ended already."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from loraplex_engine.loop.calls import failing_into, run_call
from loraplex_engine.messages import Call


def test_a_failure_of_the_call_ends_the_future_of_what_it_begins() -> None:
    future: Future[int] = Future()

    run_call(Call(lambda: 1 // 0, failing_into(future)))

    assert isinstance(future.exception(0), ZeroDivisionError)


def test_a_call_that_succeeds_leaves_the_future_open() -> None:
    future: Future[int] = Future()

    run_call(Call(lambda: 1, failing_into(future)))

    assert not future.done()


@pytest.mark.parametrize("end", [Future.cancel, lambda future: future.set_result(7)], ids=["cancelled", "resolved"])
def test_a_future_that_has_ended_stays_as_it_is(end: object) -> None:
    future: Future[int] = Future()
    end(future)  # type: ignore[operator]

    run_call(Call(lambda: 1 // 0, failing_into(future)))

    assert future.cancelled() or future.result(0) == 7
