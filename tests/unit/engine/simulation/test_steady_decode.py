"""Steps taken at once are the steps taken one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_engine.scheduler.step_costs import StepCosts
from loraplex_engine.simulation.steady_decode import SteadyDecode, observe_steady
from loraplex_engine.step import StepPlan, StepResult
from support.scheduler_rig import Rig, make_submission

if TYPE_CHECKING:
    from loraplex_engine.scheduler.decode_state import Rows
    from loraplex_engine.scheduler.scheduler import Scheduler
    from numpy.typing import NDArray

STEP_S = 0.01
TOKEN = 5


def draw(rows: Rows, _first: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    return np.full((len(rows), count), TOKEN, dtype=np.int32)


def result_of(plan: StepPlan) -> StepResult:
    slots = plan.slots[plan.sample_rows]
    return StepResult(step_id=plan.step_id, slots=slots, token_ids=np.full(len(slots), TOKEN, dtype=np.int32))


def step(rig: Rig, decided: Rows | None = None) -> None:
    plan = rig.scheduler.schedule() if decided is None else rig.scheduler.plan(decided)
    rig.now_s += STEP_S
    if plan is not None:
        rig.scheduler.update(result_of(plan))
    rig.scheduler.take_outputs()


def steady_of(rig: Rig) -> SteadyDecode:
    return SteadyDecode(rig.scheduler, pool=rig.pool, cache=rig.cache, clock=rig.clock)


def make_rig(lengths: list[tuple[int, int]], num_waiting: int, num_pages: int, late_key: str = "late") -> Rig:
    rig = Rig(num_pages=num_pages, max_num_seqs=len(lengths), max_num_batched_tokens=512, max_model_len=256)
    for slot, (prompt, outputs) in enumerate(lengths):
        rig.scheduler.submit(make_submission(slot=slot, prompt=[slot] * prompt, max_new_tokens=outputs))
    for slot in range(num_waiting):
        rig.scheduler.submit(make_submission(slot=100 + slot, prompt=[50], max_new_tokens=3, fairness_key=late_key))
    return rig


def facts(scheduler: Scheduler) -> dict[str, object]:
    state, rows = scheduler.batch.state, scheduler.batch.rows
    ends = (state.num_prompt_tokens + state.num_outputs).take(rows).tolist()
    return {
        "requests": [request.submission.session_slot for request in scheduler.batch.requests],
        "waiting": sorted(request.number for request in scheduler.queue),
        "computed": state.num_computed.take(rows).tolist(),
        "positions": state.next_position.take(rows).tolist(),
        "tokens": [state.tokens[row, :end].tolist() for row, end in zip(rows.tolist(), ends, strict=True)],
        "outputs": scheduler.counters.num_output_tokens,
        "steps": scheduler.counters.num_steps,
        "service": [scheduler.queue.shares.service_of(key) for key in ("", "late")],
        "preemptions": scheduler.counters.num_preemptions,
    }


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=5),
    num_waiting=st.integers(0, 4),
    num_pages=st.sampled_from([64, 128, 400]),
    share=st.floats(0, 1),
    decides=st.booleans(),
)
def test_a_jump_ends_where_single_steps_end(
    lengths: list[tuple[int, int]], num_waiting: int, num_pages: int, share: float, decides: bool
) -> None:
    jumping, stepping = (make_rig(lengths, num_waiting, num_pages) for _ in range(2))
    for _ in range(400):
        if jumping.scheduler.num_open == 0:
            break
        decided = jumping.scheduler.decide() if decides else None
        horizon = steady_of(jumping).horizon
        count = max(1, int(share * horizon)) if horizon else 0
        if count:
            jumping.now_s += count * STEP_S
            steady_of(jumping).skip(count, draw)
            for _ in range(count):
                step(stepping)
        else:
            step(jumping, decided)
            step(stepping)
        assert facts(jumping.scheduler) == facts(stepping.scheduler)
        jumping.check_integrity()
    assert jumping.scheduler.num_open == 0


def test_the_horizon_is_the_steps_until_the_first_request_ends() -> None:
    rig = make_rig([(4, 20), (4, 12)], num_waiting=3, num_pages=64, late_key="")
    step(rig)

    assert steady_of(rig).horizon == 11  # of 12 outputs one came with the prefill

    rig.now_s += 11 * STEP_S
    steady_of(rig).skip(11, draw)
    assert len(rig.scheduler.batch) == 1
    assert steady_of(rig).horizon == 0  # a request waits and now there is a place
    step(rig)
    assert len(rig.scheduler.batch) == 2


def test_there_is_no_horizon_while_something_is_to_be_decided() -> None:
    rig = make_rig([(40, 20), (4, 12)], num_waiting=0, num_pages=64)
    assert steady_of(rig).horizon == 0  # no request runs

    plan = rig.scheduler.schedule()
    assert plan is not None
    assert steady_of(rig).horizon == 0  # a step is in flight

    rig.scheduler.update(result_of(plan))
    assert steady_of(rig).horizon > 0
    rig.scheduler.submit(make_submission(slot=9))
    assert steady_of(rig).horizon == 0  # an arrival has not been looked at


def test_the_horizon_ends_before_pages_run_out() -> None:
    rig = make_rig([(4, 100), (4, 100)], num_waiting=0, num_pages=30)
    step(rig)

    horizon = steady_of(rig).horizon
    assert 0 < horizon < 99
    rig.now_s += horizon * STEP_S
    steady_of(rig).skip(horizon, draw)
    rig.check_integrity()
    assert rig.scheduler.counters.num_preemptions == 0


def test_costs_learn_from_jumps() -> None:
    rig = make_rig([(4, 200)], num_waiting=0, num_pages=64)
    step(rig)
    rig.now_s += 50 * 0.02
    steady_of(rig).skip(50, draw)

    assert rig.scheduler.costs.decode_step_s == pytest.approx(0.02, rel=1e-3)


@given(first_s=st.floats(1e-3, 0.1), growth_s=st.floats(0, 1e-3), num_steps=st.integers(1, 80), known=st.booleans())
def test_costs_learn_the_same_from_a_jump_as_from_its_steps(
    first_s: float, growth_s: float, num_steps: int, known: bool
) -> None:
    at_once, one_by_one = StepCosts(), StepCosts()
    now_s = 0.0
    for costs in (at_once, one_by_one):
        costs.observe(launched_s=0.0, done_s=0.5, num_prefill_tokens=0 if known else 100)
    now_s = 0.5
    for index in range(num_steps):
        begun_s, now_s = now_s, now_s + first_s + growth_s * index
        one_by_one.observe(launched_s=begun_s, done_s=now_s, num_prefill_tokens=0)

    observe_steady(at_once, done_s=now_s, num_steps=num_steps, growth_s=growth_s)

    assert at_once.decode_step_s == pytest.approx(one_by_one.decode_step_s)
    assert at_once.longest_step_s == pytest.approx(one_by_one.longest_step_s)
