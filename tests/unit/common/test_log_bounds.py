"""No caller fills the log: lines are clipped, and the same warning over and over is dropped and counted."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from loraplex_common.log_bounds import MAX_ALIKE, MAX_VALUE_CHARS, WINDOW_S, Flood, clip


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(msg: Any = "accept failed on 7", *, name: str = "asyncio", level: int = logging.ERROR) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, msg, None, None)


@pytest.mark.parametrize("value", ["x" * 4_000_000, ["x" * 4_000_000], {"k": "x" * 4_000_000}])
def test_a_value_is_clipped(value: Any) -> None:
    line = clip(None, "", {"event": "e", "value": value})

    assert len(line["value"]) < MAX_VALUE_CHARS + 100


@pytest.mark.parametrize("make", [record, lambda: record({"event": "lost", "slot": 4})])
def test_a_flood_of_one_warning_is_cut_and_the_last_line_says_so(make: Any) -> None:
    flood = Flood(Clock())

    passed = [line for line in (make() for _ in range(10_000)) if flood.filter(line)]

    assert len(passed) == MAX_ALIKE
    assert "dropped" in str(passed[-1].msg)
    assert "dropped" not in str(passed[-2].msg)


def test_what_was_dropped_is_told_when_it_comes_again() -> None:
    clock = Clock()
    flood = Flood(clock)
    for _ in range(MAX_ALIKE + 7):
        flood.filter(record())
    clock.now = WINDOW_S

    line = record()

    assert flood.filter(line)
    assert "7 lines like this were dropped" in line.msg


def test_other_warnings_and_the_line_of_each_request_still_pass() -> None:
    flood = Flood(Clock())
    for _ in range(MAX_ALIKE + 1):
        flood.filter(record())

    assert flood.filter(record("something else"))
    assert all(flood.filter(record({"event": "request"}, level=logging.INFO)) for _ in range(10 * MAX_ALIKE))


def test_a_flood_of_many_kinds_holds_no_memory() -> None:
    flood = Flood(Clock())
    for n in range(10_000):
        flood.filter(record(f"{n} is new"))

    assert len(flood._kinds) <= 256
