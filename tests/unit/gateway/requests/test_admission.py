"""Limits hold, priorities go first, and nothing is lost on the way."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from loraplex_common.errors import DrainingError, SaturatedError
from loraplex_gateway.requests.admission import AdmissionController, Place
from loraplex_gateway.types import Priority


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(max_concurrent: int = 2, max_queued: int = 3) -> AdmissionController:
    return AdmissionController(max_concurrent=max_concurrent, max_queued=max_queued, clock=Clock())


async def test_requests_run_up_to_the_limit_then_wait() -> None:
    controller = make()

    places = [controller.enter(Priority.NORMAL) for _ in range(4)]

    assert [place.is_admitted for place in places] == [True, True, False, False]
    assert [place.position for place in places[2:]] == [0, 1]
    places[0].leave()
    assert places[2].is_admitted
    assert places[2].admitted.done()


async def test_a_full_queue_refuses_with_an_estimate_and_a_drop_reason() -> None:
    controller = make(1, 1)
    controller.enter(Priority.NORMAL)
    controller.enter(Priority.NORMAL)

    with pytest.raises(SaturatedError) as caught:
        controller.enter(Priority.NORMAL)

    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0
    assert caught.value.drop_reason == "rejected-saturated"


async def test_higher_priority_goes_first() -> None:
    controller = make(1, 9)
    running = controller.enter(Priority.NORMAL)
    low, normal, high = (controller.enter(p) for p in (Priority.BATCH, Priority.NORMAL, Priority.HIGH))

    running.leave()
    assert high.is_admitted
    high.leave()
    assert normal.is_admitted
    normal.leave()
    assert low.is_admitted


async def test_leaving_the_queue_makes_room_in_it() -> None:
    controller = make(1, 1)
    controller.enter(Priority.NORMAL)
    waiting = controller.enter(Priority.NORMAL)

    waiting.leave()
    waiting.leave()

    assert controller.num_waiting == 0
    assert not controller.enter(Priority.NORMAL).is_admitted


async def test_a_draining_controller_admits_nobody_new_but_everybody_who_waits() -> None:
    controller = make(1, 1)
    running, waiting = controller.enter(Priority.NORMAL), controller.enter(Priority.NORMAL)
    controller.drain()

    with pytest.raises(DrainingError):
        controller.enter(Priority.NORMAL)
    running.leave()
    assert waiting.is_admitted


async def test_positions_close_up_when_somebody_gives_up() -> None:
    controller = make(1, 9)
    controller.enter(Priority.NORMAL)
    first, second, third = (controller.enter(Priority.NORMAL) for _ in range(3))

    second.leave()

    assert (first.position, third.position) == (0, 1)


async def test_the_estimate_follows_the_service_time() -> None:
    clock = Clock()
    controller = AdmissionController(max_concurrent=1, max_queued=9, clock=clock)
    before = controller.estimate_s(1)

    for _ in range(30):
        place = controller.enter(Priority.NORMAL)
        clock.now_s += 20.0
        place.leave()

    assert controller.estimate_s(1) > before + 10


class AdmissionMachine(RuleBasedStateMachine):
    """Any order of entering and leaving keeps the counts right."""

    def __init__(self) -> None:
        super().__init__()
        import asyncio

        self.loop = asyncio.new_event_loop()
        self.places: list[Place] = []
        self.controller = make(3, 4)

    @rule(priority=st.sampled_from(list(Priority)))
    def enter(self, priority: Priority) -> None:
        async def go() -> Place | None:
            try:
                return self.controller.enter(priority)
            except SaturatedError:
                assert len(self.places) == 7
                return None

        place = self.loop.run_until_complete(go())
        if place is not None:
            self.places.append(place)

    @precondition(lambda self: bool(self.places))
    @rule(n=st.integers(0, 6))
    def leave(self, n: int) -> None:
        self.places.pop(n % len(self.places)).leave()

    @invariant()
    def counts_fit(self) -> None:
        self.controller.check_integrity()
        assert self.controller.num_running + self.controller.num_waiting == len(self.places)
        assert sum(place.is_admitted for place in self.places) == self.controller.num_running

    def teardown(self) -> None:
        self.loop.close()


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=40, deadline=None)
