"""Other systems' memory policies in our classes: shares that nobody crosses, and least-recently-used order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_engine.limits import Eviction, SchedulingPolicy
from loraplex_engine.pages.page_worth import EXPECTED_COST, page_worth_of
from loraplex_engine.simulation.adapters import Adapters
from loraplex_engine.simulation.fleet import Fleet
from loraplex_engine.simulation.outcomes import End
from support.simulation_rig import TINY, make_setup, make_trace

if TYPE_CHECKING:
    from loraplex_engine.simulation.engine import SimulatedEngine


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kv_share=st.sampled_from([0.3, 0.5, 0.7]),
    eviction=st.sampled_from(list(Eviction)),
    enable_warming=st.booleans(),
)
def test_neither_side_of_a_cut_pool_takes_from_the_other(
    seed: int, kv_share: float, eviction: Eviction, enable_warming: bool
) -> None:
    rng = np.random.default_rng(seed)
    trace = make_trace(
        np.cumsum(rng.exponential(0.05, 40)).tolist(),
        adapter=rng.integers(-1, 8, 40).tolist(),
        prompt_tokens=rng.integers(1, 40, 40).tolist(),
        output_tokens=rng.integers(1, 40, 40).tolist(),
    )
    policy = SchedulingPolicy(kv_share=kv_share, eviction=eviction, enable_warming=enable_warming)
    setup = replace(make_setup(num_pages=100), policy=policy)
    most_kv = round(100 * kv_share)

    def watch(engine: SimulatedEngine) -> None:
        assert engine.pool.num_kv + engine.pool.num_cached <= most_kv
        assert engine.pool.num_adapter <= 100 - most_kv

    fleet = Fleet(setup, Adapters(TINY, 8, (4, 8)), trace, watch=watch)
    outcomes = fleet.run()

    assert (outcomes.end == End.DONE).all()
    fleet.engines[0].scheduler.check_integrity()


def test_by_recency_the_last_use_alone_counts() -> None:
    recency = page_worth_of(Eviction.RECENCY)

    often, late = (
        recency.of_adapter(octaves=octaves, cost_s=1.0, used=used) for octaves, used in ((10.0, 1.0), (1.0, 2.0))
    )

    assert late > often
    assert recency.of_blocks(np.array([5.0, -np.inf]), 2.0).tolist() == [2.0, 2.0]
    assert recency.block_cost(1e-3) == 0.0


def test_by_expected_cost_frequent_and_dear_adapters_are_worth_more() -> None:
    base = EXPECTED_COST.of_adapter(octaves=3.0, cost_s=1e-3, used=0.0)

    assert EXPECTED_COST.of_adapter(octaves=4.0, cost_s=1e-3, used=0.0) == base + 1
    assert EXPECTED_COST.of_adapter(octaves=3.0, cost_s=2e-3, used=9.0) == base + 1
    assert EXPECTED_COST.of_blocks(np.array([2.0]), 2.0).tolist() == [3.0]


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_share"):
        SchedulingPolicy(kv_share=1.5)
