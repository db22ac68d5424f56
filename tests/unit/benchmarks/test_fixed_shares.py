"""Other systems' memory policies in our classes: shares that KV and adapters keep to, and least-recently-used order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_bench.policies.fixed_shares import RECENCY, FixedShares
from loraplex_engine.limits import SchedulingPolicy
from loraplex_engine.pages.page_worth import EXPECTED_COST, PageWorth
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
    page_worth=st.sampled_from([EXPECTED_COST, RECENCY]),
    enable_warming=st.booleans(),
)
def test_neither_side_of_a_cut_pool_takes_from_the_other(
    seed: int, kv_share: float, page_worth: PageWorth, enable_warming: bool
) -> None:
    rng = np.random.default_rng(seed)
    trace = make_trace(
        np.cumsum(rng.exponential(0.05, 40)).tolist(),
        adapter=rng.integers(-1, 8, 40).tolist(),
        prompt_tokens=rng.integers(1, 40, 40).tolist(),
        output_tokens=rng.integers(1, 40, 40).tolist(),
    )
    setup = replace(
        make_setup(num_pages=100).with_limits(policy=SchedulingPolicy(enable_warming=enable_warming)),
        page_worth=page_worth,
        page_sources=FixedShares(kv_share),
    )
    most_kv = round(100 * kv_share)

    def watch(engine: SimulatedEngine) -> None:
        assert engine.pool.num_kv + engine.pool.num_cached <= most_kv
        assert engine.pool.num_adapter <= 100 - most_kv

    fleet = Fleet(setup, Adapters(TINY, 8, (4, 8)), trace, watch=watch)
    outcomes = fleet.run()

    assert (outcomes.end == End.DONE).all()
    fleet.engines[0].scheduler.check_integrity()


def test_by_recency_the_last_use_alone_counts() -> None:
    often, late = (
        RECENCY.of_adapter(octaves=octaves, cost_s=1.0, used=used) for octaves, used in ((10.0, 1.0), (1.0, 2.0))
    )

    assert late > often
    assert RECENCY.of_blocks(np.array([5.0, -np.inf]), 2.0).tolist() == [2.0, 2.0]
    assert RECENCY.block_cost(1e-3) == 0.0


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_share"):
        FixedShares(kv_share=1.5)
