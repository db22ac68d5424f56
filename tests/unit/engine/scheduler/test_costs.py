"""Costs measured while the engine runs."""

from __future__ import annotations

import pytest
from loraplex_engine.adapters.copy_costs import CopyCosts
from loraplex_engine.scheduler.step_costs import StepCosts


def test_steps_teach_what_decoding_and_prefill_cost() -> None:
    costs = StepCosts()
    now_s = 0.0
    for number in range(200):
        prefill = 100 if number % 4 == 0 else 0
        took_s = 0.010 + 0.0002 * prefill
        costs.observe(launched_s=now_s, done_s=now_s + took_s, num_prefill_tokens=prefill)
        now_s += took_s

    assert costs.decode_step_s == pytest.approx(0.010, rel=0.02)
    assert costs.prefill_s_per_token == pytest.approx(0.0002, rel=0.05)
    assert costs.prefill_s(500) == pytest.approx(0.11, rel=0.05)


def test_overlapped_steps_are_not_counted_twice() -> None:
    costs = StepCosts()
    for number in range(50):  # each is launched while the one before is still computed
        costs.observe(launched_s=0.01 * (number - 1), done_s=0.01 * (number + 1), num_prefill_tokens=0)

    assert costs.decode_step_s == pytest.approx(0.01, rel=0.01)


def test_nothing_is_estimated_before_prefill_was_measured() -> None:
    costs = StepCosts()
    costs.observe(launched_s=0.0, done_s=0.01, num_prefill_tokens=0)
    assert not costs.is_measured

    costs.observe(launched_s=0.01, done_s=0.02, num_prefill_tokens=64)

    assert costs.is_measured


def test_a_clock_that_stands_still_teaches_nothing() -> None:
    costs = StepCosts()
    before = costs.prefill_s_per_token
    costs.observe(launched_s=1.0, done_s=1.0, num_prefill_tokens=64)

    assert (costs.prefill_s_per_token, costs.is_measured) == (before, False)


def test_copies_on_one_stream_share_its_bandwidth() -> None:
    costs = CopyCosts()
    for number in range(20):  # all ordered at once, done one after the other
        costs.copied(4, began_s=0.0, done_s=0.004 * (number + 1))

    assert costs.copy_s_per_page == pytest.approx(0.001, rel=0.01)


def test_an_adapter_that_left_the_arena_costs_a_fetch_more() -> None:
    costs = CopyCosts()
    costs.copied(1, began_s=0.0, done_s=0.001)
    costs.fetched(0.2)

    assert costs.return_s_per_page(10, is_in_arena=True) == pytest.approx(0.001)
    assert costs.return_s_per_page(10, is_in_arena=False) == pytest.approx(0.021)
