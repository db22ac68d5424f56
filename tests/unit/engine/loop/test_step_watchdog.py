"""Which silence of the step loop is a hang, and what becomes of its requests then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.errors import EngineHungError
from loraplex_engine.loop.step_times import StepTimes
from loraplex_engine.loop.step_watchdog import LOOK_S, Pulse, StepWatchdog
from loraplex_engine.scheduler.step_costs import StepCosts
from support.engine_harness import FAKE_PAGE_BYTES, WAIT_S, fake_engine
from support.fake_adapters import fake_geometry

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 5.0


class Watch:
    """A watchdog that looks when it is told to, at a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.has_work = False
        self.pulse = Pulse()
        self._watchdog = StepWatchdog(
            self.pulse,
            has_work=lambda: self.has_work,
            patience_s=PATIENCE_S,
            on_hang=lambda _: None,
            clock=lambda: self.now_s,
        )

    def until_hung(self, most_s: float = 200.0) -> float | None:
        """Look on until it says that the loop hangs; return after how long, or None if it never does."""
        begin_s = self.now_s
        while self.now_s < begin_s + most_s:
            self.now_s += LOOK_S
            if self._watchdog.look() is not None:
                return self.now_s - begin_s
        return None


@pytest.mark.parametrize(("expected_s", "hung_after_s"), [(0.0, 5.0), (0.01, 5.0), (1.0, 5.0), (4.0, 20.0)])
def test_a_step_hangs_once_it_took_five_times_what_it_should(expected_s: float, hung_after_s: float) -> None:
    watch = Watch()
    watch.pulse.works(expected_s)

    assert watch.until_hung() == pytest.approx(hung_after_s, abs=3 * LOOK_S)


def test_a_loop_that_gets_on_does_not_hang() -> None:
    watch = Watch()
    for _ in range(100):
        watch.pulse.works(0.1)

        assert watch.until_hung(PATIENCE_S - 3 * LOOK_S) is None


def test_a_loop_without_work_may_sleep_and_one_with_work_may_not() -> None:
    watch = Watch()
    watch.pulse.sleeps()
    assert watch.until_hung() is None

    watch.has_work = True

    assert watch.until_hung() == pytest.approx(PATIENCE_S, abs=3 * LOOK_S)


def test_a_process_that_was_stopped_does_not_take_its_loop_for_hung() -> None:
    watch = Watch()
    watch.pulse.works(0.01)
    assert watch.until_hung(1.0) is None

    watch.now_s += 3600.0

    assert watch.until_hung(1.0) is None
    watch.pulse.works(0.01)
    assert watch.until_hung(PATIENCE_S - 1.0) is None


def test_a_first_long_prompt_on_a_slow_device_is_given_time_and_later_ones_what_was_measured() -> None:
    costs = StepCosts()
    prompt = np.array([0], dtype=np.int32), np.array([1024], dtype=np.int32)
    slow, fast = (StepTimes(costs, fake_geometry(FAKE_PAGE_BYTES), backend=backend) for backend in ("torch", "cuda"))
    first_s = slow.of(*prompt)
    assert first_s > fast.of(*prompt)

    costs.observe(launched_s=0.0, done_s=20.0, num_prefill_tokens=1000)

    assert slow.of(*prompt) == fast.of(*prompt) > 20.0
    later = np.array([8192], dtype=np.int32), np.array([1024], dtype=np.int32)
    assert slow.of(*later) > slow.of(*prompt), "attention over a long context takes its time"


def test_a_step_that_never_ends_ends_every_session_and_whoever_comes_later() -> None:
    with fake_engine(step_patience_s=0.2) as (harness, runner):
        harness.generate([[1, 2, 3]])
        runner.gate.clear()
        began_s = time.monotonic()
        harness.submit([1, 2, 3])

        with pytest.raises(EngineHungError, match="has not got on"):
            harness.wait_until(lambda: False)

        assert time.monotonic() - began_s < 5.0
        _wait_for(lambda: bool(harness.crashes))
        assert isinstance(harness.crashes[0], EngineHungError)
        with pytest.raises(EngineHungError):
            harness.engine.list_adapters().result(WAIT_S)
        assert not harness.engine.is_healthy
        runner.gate.set()


def test_an_engine_that_hangs_can_be_closed_and_keeps_what_the_device_may_use() -> None:
    with fake_engine(step_patience_s=0.2) as (harness, runner):
        runner.gate.clear()
        harness.submit([1, 2, 3])
        _wait_for(lambda: bool(harness.crashes))

        harness.engine.close()

        assert len(harness.engine.arena.view) > 0
        assert not runner.is_closed
        runner.gate.set()
        _wait_for(lambda: runner.is_closed)


def test_a_crash_or_an_end_in_order_is_no_hang() -> None:
    with fake_engine(step_patience_s=0.2) as (harness, runner):
        runner.raise_on_launch = RuntimeError("device lost")
        harness.wait([harness.submit([1])])
        _wait_for(lambda: bool(harness.crashes))
        time.sleep(0.6)  # the claim is about time passing

        assert [type(crash) for crash in harness.crashes] == [RuntimeError]


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)
