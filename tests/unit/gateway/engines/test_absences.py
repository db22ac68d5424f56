"""How long an engine that takes no requests is expected."""

from __future__ import annotations

import math

from loraplex_gateway.engines.absences import Absences

BASES = {"a": "llama", "b": "llama", "c": "qwen"}


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nobody_is_expected_while_everybody_is_there() -> None:
    absences = Absences(60.0, Clock())

    absences.update({"a": True, "c": True}, BASES)

    assert absences.expected_until("llama") == -math.inf


def test_an_engine_is_expected_from_when_it_was_away_first_and_by_its_own_base_only() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    absences.update({"a": False, "c": True}, BASES)
    clock.now += 10.0

    absences.update({"a": False, "c": True}, BASES)

    assert absences.expected_until("llama") == 160.0
    assert absences.expected_until("qwen") == -math.inf


def test_an_engine_that_left_the_registry_is_still_expected_for_a_while() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    absences.update({"a": False}, BASES)

    absences.update({}, BASES)
    assert absences.expected_until("llama") == 160.0

    clock.now += 61.0
    absences.update({}, BASES)
    assert absences.expected_until("llama") == -math.inf


def test_an_engine_that_is_never_reached_is_not_expected_for_ever() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    for _ in range(10):
        absences.update({"a": False}, BASES)
        clock.now += 20.0

    assert absences.expected_until("llama") == 160.0 < clock.now


def test_an_engine_that_came_back_and_is_lost_again_is_expected_anew() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    absences.update({"a": False}, BASES)
    absences.update({"a": True}, BASES)
    clock.now += 50.0

    absences.update({"a": False}, BASES)

    assert absences.expected_until("llama") == 210.0
