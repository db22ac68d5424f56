"""An engine proves on its session that it lives."""

from __future__ import annotations

import pytest
from loraplex.v1 import engine_pb2
from loraplex_gateway.engines.liveness import PROOF_S, Liveness


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def message(step: int, *, running: int = 0, sequence: int = 1) -> engine_pb2.SessionResponse:
    return engine_pb2.SessionResponse(step=step, load=engine_pb2.LoadReport(running=running, sequence=sequence))


def test_an_idle_engine_proves_itself_by_its_load_reports_and_a_silent_one_does_not() -> None:
    clock = Clock()
    liveness = Liveness(clock)
    assert not liveness.is_proven

    for _ in range(30):
        liveness.hear(message(step=7), has_work=False)
        clock.now += 1.0
        assert liveness.is_proven

    clock.now += PROOF_S
    assert not liveness.is_proven


@pytest.mark.parametrize(("moves", "is_proven"), [(True, True), (False, False)])
def test_an_engine_with_work_proves_itself_by_its_steps_alone(moves: bool, is_proven: bool) -> None:
    clock = Clock()
    liveness = Liveness(clock)
    for n in range(int(PROOF_S) + 2):
        liveness.hear(message(step=n if moves else 7, running=2), has_work=True)
        clock.now += 1.0

    assert liveness.is_proven is is_proven


def test_a_session_that_ended_proves_nothing() -> None:
    liveness = Liveness(Clock())
    liveness.hear(message(step=1), has_work=False)

    liveness.forget()

    assert not liveness.is_proven
