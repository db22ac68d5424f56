"""How long an engine that takes no requests is expected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loraplex_common.registry import EngineRecord
from loraplex_gateway.engines.absences import Absences

if TYPE_CHECKING:
    from collections.abc import Callable


def record(engine_id: str, base: str) -> EngineRecord:
    sizes = {
        "max_model_len": 8,
        "vocab_size": 8,
        "num_pages": 8,
        "block_tokens": 8,
        "page_bytes": 8,
        "max_image_pages": 8,
    }
    return EngineRecord(engine_id=engine_id, target="", base_model=base, base_fingerprint=base, **sizes)  # type: ignore[arg-type]


RECORDS = {engine_id: record(engine_id, base) for engine_id, base in {"a": "llama", "b": "llama", "c": "qwen"}.items()}


def of(base: str) -> Callable[[EngineRecord], bool]:
    return lambda record: record.base_fingerprint == base


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nobody_is_expected_while_everybody_is_there() -> None:
    absences = Absences(60.0, Clock())

    absences.update({"a": True, "c": True}, RECORDS)

    assert absences.expected_until(of("llama")) == -math.inf


def test_an_engine_is_expected_from_when_it_was_away_first_and_by_its_own_base_only() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    absences.update({"a": False, "c": True}, RECORDS)
    clock.now += 10.0

    absences.update({"a": False, "c": True}, RECORDS)

    assert absences.expected_until(of("llama")) == 160.0
    assert absences.expected_until(of("qwen")) == -math.inf


def test_an_engine_that_left_the_registry_is_still_expected_for_a_while() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    absences.update({"a": False}, RECORDS)

    absences.update({}, RECORDS)
    assert absences.expected_until(of("llama")) == 160.0

    clock.now += 61.0
    absences.update({}, RECORDS)
    assert absences.expected_until(of("llama")) == -math.inf


def test_an_engine_that_is_never_reached_is_not_expected_for_ever() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    for _ in range(10):
        absences.update({"a": False}, RECORDS)
        clock.now += 20.0

    assert absences.expected_until(of("llama")) == 160.0 < clock.now


def test_an_engine_that_came_back_and_is_lost_again_is_expected_anew() -> None:
    clock = Clock()
    absences = Absences(60.0, clock)
    absences.update({"a": False}, RECORDS)
    absences.update({"a": True}, RECORDS)
    clock.now += 50.0

    absences.update({"a": False}, RECORDS)

    assert absences.expected_until(of("llama")) == 210.0
