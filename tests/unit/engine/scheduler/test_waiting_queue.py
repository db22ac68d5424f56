"""The order of waiting requests, against a model that sorts all of them each time."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex_engine.limits import QueuePolicy
from loraplex_engine.messages import Priority
from loraplex_engine.scheduler.fair_shares import FairShares
from loraplex_engine.scheduler.request import Request, RequestState, make_request
from loraplex_engine.scheduler.waiting_queue import WaitingQueue
from support.scheduler_rig import make_submission

PROMOTE_AFTER_S = 30.0
SLO_S = 10.0


def make(number: int, now_s: float = 0.0, **fields: object) -> Request:
    return make_request(
        make_submission(slot=number, **fields),  # type: ignore[arg-type]
        number=number,
        now_s=now_s + 1e-9,
        max_model_len=64,
    )


def order(queue: WaitingQueue, now_s: float = 0.0) -> list[int]:
    numbers = []
    while (request := queue.first(now_s)) is not None:
        numbers.append(request.number)
        queue.set_aside(request)
    queue.restore()
    return numbers


def test_classes_go_before_fairness_and_fairness_before_arrival() -> None:
    queue = WaitingQueue()
    queue.add(make(0, fairness_key="a"))
    queue.add(make(1, fairness_key="b"))
    queue.add(make(2, fairness_key="a", priority=Priority.HIGH))
    queue.add(make(3, fairness_key="b", priority=Priority.BATCH))
    queue.shares.charge(queue.shares.enter("a"), 10)

    assert order(queue) == [2, 1, 0, 3]


def test_looking_changes_nothing() -> None:
    queue = WaitingQueue()
    for number in range(5):
        queue.add(make(number, fairness_key=str(number % 2)))
    version = queue.version

    first = order(queue)

    assert order(queue) == first
    assert queue.version == version


def test_a_request_behind_a_higher_class_rises_a_class_at_a_time() -> None:
    queue = WaitingQueue(promote_after_s=PROMOTE_AFTER_S)
    old = make(0, priority=Priority.BATCH)
    queue.add(old)
    queue.add(make(1, priority=Priority.HIGH))

    levels = []
    for now_s in (0, 29, 31, 59, 61, 1000):
        queue.promote(now_s)
        levels.append(old.level)

    assert levels == [1, 1, 2, 2, 3, 3]


def test_a_request_that_a_higher_class_overtook_rises() -> None:
    queue = WaitingQueue(promote_after_s=PROMOTE_AFTER_S)
    old, urgent = make(0), make(1, priority=Priority.HIGH)
    queue.add(old)
    queue.add(urgent)
    queue.remove(urgent)

    queue.promote(PROMOTE_AFTER_S + 1)

    assert old.level == Priority.HIGH


def test_a_backlog_does_not_overtake_its_own_class_by_age() -> None:
    queue = WaitingQueue(promote_after_s=PROMOTE_AFTER_S)
    for number in range(3):
        queue.add(make(number, fairness_key="greedy"))
    queue.shares.charge(queue.shares.enter("greedy"), 10)
    queue.promote(10 * PROMOTE_AFTER_S)
    queue.add(make(3, fairness_key="steady", now_s=10 * PROMOTE_AFTER_S))
    queue.shares.charge(queue.shares.enter("greedy"), 1)

    assert order(queue, now_s=10 * PROMOTE_AFTER_S)[0] == 3


def test_of_a_capped_key_nobody_is_next_until_one_of_it_leaves() -> None:
    shares = FairShares(max_running_per_key=1)
    queue = WaitingQueue(shares)
    first, second = make(0, fairness_key="a"), make(1, fairness_key="a")
    queue.add(first)
    queue.add(second)
    queue.add(make(2, fairness_key="b"))
    queue.remove(first)
    shares.run(first.share)

    assert order(queue) == [2]
    shares.cease_to_run(first.share)
    queue.uncap(first.share)

    assert sorted(order(queue)) == [1, 2]


def test_newest_goes_first_only_while_the_oldest_has_waited_for_half_the_objective() -> None:
    queue = WaitingQueue(policy=QueuePolicy.NEWEST_FIRST, ttft_slo_s=SLO_S)
    for number in range(3):
        queue.add(make(number, now_s=float(number)))

    assert order(queue, now_s=4.0) == [0, 1, 2]
    assert order(queue, now_s=6.5) == [2, 1, 0]


def test_a_request_that_is_not_there_cannot_be_removed() -> None:
    queue = WaitingQueue()
    request = make(0)
    queue.add(request)
    queue.remove(request)

    with pytest.raises(KeyError):
        queue.remove(request)


class WaitingQueueMachine(RuleBasedStateMachine):
    """Requests come, park, rise, run and go; the next one is always the one a full sort puts first."""

    @initialize(policy=st.sampled_from([QueuePolicy.FCFS, QueuePolicy.NEWEST_FIRST]), cap=st.sampled_from([None, 1, 2]))
    def start(self, policy: QueuePolicy, cap: int | None) -> None:
        self.policy = policy
        self.shares = FairShares(max_running_per_key=cap)
        self.queue = WaitingQueue(self.shares, policy=policy, ttft_slo_s=SLO_S, promote_after_s=PROMOTE_AFTER_S)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.number = 0
        self.now_s = 0.0

    @rule(key=st.sampled_from("abc"), priority=st.sampled_from(Priority), adapter=st.sampled_from([None, "x", "y"]))
    def add(self, key: str, priority: Priority, adapter: str | None) -> None:
        request = make(self.number, self.now_s, fairness_key=key, priority=priority, adapter=adapter)
        self.number += 1
        self.queue.add(request)
        self.waiting.append(request)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        self.queue.remove(request)
        self.shares.leave(request.share)
        request.move_to(RequestState.ENDED)
        self.waiting.remove(request)

    @rule()
    def run_first(self) -> None:
        request = self.queue.first(self.now_s)
        if request is not None:
            self.queue.remove(request)
            request.move_to(RequestState.RUNNING)
            self.shares.run(request.share)
            self.shares.charge(request.share, 3)
            self.waiting.remove(request)
            self.running.append(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), is_preempted=st.booleans())
    def leave_slot(self, data: st.DataObject, is_preempted: bool) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        self.shares.cease_to_run(request.share)
        self.queue.uncap(request.share)
        if is_preempted:
            request.move_to(RequestState.WAITING)
            self.queue.add(request)
            self.waiting.append(request)
            self.queue.promote(self.now_s)
        else:
            self.shares.leave(request.share)
            request.move_to(RequestState.ENDED)

    @precondition(lambda self: any(r.digests and not r.is_parked for r in self.waiting))
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([r for r in self.waiting if r.digests and not r.is_parked]))
        self.queue.park(request, self.now_s)

    @rule(digest=st.sampled_from("xy"))
    def unpark(self, digest: str) -> None:
        self.queue.unpark(digest, self.now_s)

    @rule(after_s=st.floats(0.1, 40))
    def wait(self, after_s: float) -> None:
        self.now_s += after_s
        self.queue.promote(self.now_s)

    def _expected(self) -> Request | None:
        """The next request by a full sort."""
        eligible = [r for r in self.waiting if not r.is_parked and not self.shares.is_capped(r.share)]
        if not eligible:
            return None
        level = max(r.level for r in eligible)
        service = min(self.shares.service(r.share) for r in eligible if r.level == level)
        served_least = {r.share for r in eligible if r.level == level and self.shares.service(r.share) == service}
        first = self.queue.first(self.now_s)
        assert first is not None
        assert first.share in served_least  # among equals any key will do
        line = [r for r in eligible if r.level == level and r.share == first.share]
        oldest = min(line, key=lambda r: r.number)
        is_overloaded = self.policy is QueuePolicy.NEWEST_FIRST and self.now_s - oldest.arrived_s > SLO_S / 2
        return max(line, key=lambda r: r.number) if is_overloaded else oldest

    @invariant()
    def the_first_is_the_first(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert self.queue.first(self.now_s) is self._expected()
        assert len(self.queue) == len(self.waiting) == len(list(self.queue))
        assert self.queue.num_tokens == sum(r.num_known_tokens for r in self.waiting)
        self.shares.check_integrity(
            waiting=[r.share for r in self.waiting],
            eligible=[r.share for r in self.waiting if not r.is_parked],
            running=[r.share for r in self.running],
        )
        for request in self.waiting:
            risen = max(0, math.floor((self.now_s - request.arrived_s) / PROMOTE_AFTER_S))
            assert request.submission.priority <= request.level <= min(3, request.submission.priority + risen)


WaitingQueueMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestWaitingQueueMachine = WaitingQueueMachine.TestCase
