"""Engines in virtual time: every request ends, equal runs are equal, and jumps change nothing."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_engine.simulation.outcomes import End, Found, summarize
from loraplex_engine.simulation.step_cost import Stretch
from loraplex_engine.simulation.trace import SavedTrace, TokenStreams, TraceError
from support.simulation_rig import TINY, make_setup, make_trace, replay


@st.composite
def traces(draw: st.DrawFn) -> SavedTrace:
    """Up to 24 requests, some at once, some apart, over few adapters or none."""
    count = draw(st.integers(1, 24))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.001, 0.013, 0.2, 3.0]), min_size=count, max_size=count))
    lengths = st.lists(st.integers(1, 40), min_size=count, max_size=count)
    return make_trace(
        np.cumsum(gaps).tolist(),
        adapter=draw(st.lists(st.integers(-1, 7), min_size=count, max_size=count)),
        prompt_tokens=draw(lengths),
        output_tokens=draw(lengths),
        tenant=draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)),
    )


@settings(max_examples=60, deadline=None)
@given(trace=traces(), num_pages=st.integers(48, 120), fill_arena=st.booleans(), num_engines=st.integers(1, 3))
def test_jumping_over_steady_steps_changes_no_outcome(
    trace: SavedTrace, num_pages: int, fill_arena: bool, num_engines: int
) -> None:
    setup = make_setup(num_pages=num_pages, fill_arena=fill_arena)

    jumped, fleet = replay(trace, setup, num_engines=num_engines, jumps=True)
    stepped, slow = replay(trace, setup, num_engines=num_engines, jumps=False)

    for name in ("first_token_s", "end_s", "load_s"):
        near, exact = getattr(jumped, name), getattr(stepped, name)
        np.testing.assert_allclose(near, exact, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_array_equal(jumped.end, stepped.end)
    np.testing.assert_array_equal(jumped.found, stepped.found)
    for one, other in zip(fleet.engines, slow.engines, strict=True):
        assert one.scheduler.counters == other.scheduler.counters
        assert one.num_turns <= other.num_turns


def test_a_jump_does_not_pass_over_a_request_whose_adapter_has_just_changed_its_state() -> None:
    # A decision that starts a load lets the next decision look at the requests that wait for the adapter; a jump from the first
    # one on admitted them one adapter later. Found by random search.
    trace = make_trace(
        [0.001 * (number + 1) for number in range(14)],
        adapter=[-1, 7, -1, 5, 1, 6, 2, 4, 5, -1, 0, 0, 3, -1],
        prompt_tokens=[27, 39, 10, 37, 18, 26, 18, 17, 22, 5, 12, 2, 1, 28],
        output_tokens=[17, 20, 35, 33, 17, 19, 7, 36, 24, 36, 6, 2, 34, 8],
        tenant=[1, 1, 0, 2, 2, 1, 0, 0, 1, 0, 2, 2, 1, 0],
    )
    setup = make_setup(num_pages=48, fill_arena=True)

    jumped, _ = replay(trace, setup, jumps=True)
    stepped, _ = replay(trace, setup, jumps=False)

    for name in ("first_token_s", "end_s"):
        np.testing.assert_allclose(getattr(jumped, name), getattr(stepped, name), rtol=1e-9, atol=1e-9, err_msg=name)


@settings(max_examples=40, deadline=None)
@given(trace=traces(), num_pages=st.integers(48, 120))
def test_every_request_ends_with_all_its_tokens(trace: SavedTrace, num_pages: int) -> None:
    outcomes, fleet = replay(trace, make_setup(num_pages=num_pages))

    assert (outcomes.end == End.DONE).all()
    assert (outcomes.first_token_s > trace.arrival_s).all()
    assert (outcomes.end_s >= outcomes.first_token_s).all()
    counters = fleet.engines[0].scheduler.counters
    assert counters.num_output_tokens == trace.output_tokens.sum()


def test_a_first_token_that_is_the_last_does_not_come_after_it() -> None:
    """Where times were added up from the arrival, request 10 of these ended 1.4e-17 s before its first token."""
    trace = make_trace(
        [0.013 * turn for turn in (1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6, 6, 7)],
        adapter=4,
        prompt_tokens=[11, 12, 40, 7, 23, 12, 32, 40, 6, 30, 28, 14, 5, 5, 17, 22, 26, 24, 38, 21],
        output_tokens=[1, 1, 40, 40, 40, 40, 1, 40, 40, 1, 1, 40, 40, 1, 1, 40, 1, 1, 40, 1],
        tenant=[0, 1, 2, 2, 0, 0, 2, 2, 2, 1, 2, 0, 1, 1, 0, 0, 1, 1, 2, 1],
    )

    outcomes, _ = replay(trace, make_setup(num_pages=48, fill_arena=False))

    single = trace.output_tokens == 1
    assert (outcomes.end_s[single] == outcomes.first_token_s[single]).all()


def test_two_replays_of_a_trace_are_equal() -> None:
    rng = np.random.default_rng(5)
    trace = make_trace(
        np.cumsum(rng.exponential(0.02, 200)).tolist(),
        adapter=rng.integers(-1, 8, 200).tolist(),
        prompt_tokens=rng.integers(1, 60, 200).tolist(),
        output_tokens=rng.integers(1, 60, 200).tolist(),
    )

    runs = [replay(trace, make_setup(), num_engines=3)[0] for _ in range(2)]

    for name in ("first_token_s", "end_s", "load_s", "end", "found"):
        np.testing.assert_array_equal(getattr(runs[0], name), getattr(runs[1], name))


def test_a_replay_makes_no_reference_cycles() -> None:
    rng = np.random.default_rng(6)
    found = []
    fleets = []  # kept: an engine's parts know each other
    for count in (20, 200):
        trace = make_trace(
            np.cumsum(rng.exponential(0.02, count)).tolist(),
            adapter=rng.integers(-1, 8, count).tolist(),
            prompt_tokens=rng.integers(1, 60, count).tolist(),
            output_tokens=rng.integers(1, 60, count).tolist(),
        )
        gc.collect()
        fleets.append(replay(trace, make_setup(fill_arena=False), num_engines=2))
        found.append(gc.collect())

    assert found[1] <= found[0]  # nothing per request: `Fleet.run` does without the search for cycles
    assert gc.isenabled()


def test_a_request_alone_takes_the_sum_of_its_steps() -> None:
    trace = make_trace([1.0], prompt_tokens=8, output_tokens=3)
    setup = make_setup()
    cost = setup.cost

    outcomes, fleet = replay(trace, setup)

    fixed = 2 * 1e-3 + TINY.weight_bytes * 1e-9
    assert outcomes.first_token_s[0] - 1.0 >= fixed
    decode_s = outcomes.end_s[0] - outcomes.first_token_s[0]
    kv = TINY.kv_bytes_per_token * 1e-7
    per_step = 2e-3 + TINY.activation_bytes_per_token * 1e-9 + 1e-4
    products = max(TINY.weight_bytes * 1e-9, 2 * (TINY.layer_weights + TINY.head_weights) * 1e-9)
    # tokens 9 and 10 of the sequence are inputs: contexts of 9 and 10
    assert decode_s == pytest.approx(2 * (per_step + products) + (9 + 10) * kv)
    assert fleet.engines[0].scheduler.counters.num_steps == 3
    assert cost.shape is TINY


def test_an_adapter_is_found_where_it_is() -> None:
    trace = make_trace([0.0, 1.0, 1.0, 30.0], adapter=[0, 0, 1, -1])

    warm, _ = replay(trace, make_setup(), num_adapters=2, ranks=[4])
    cold, fleet = replay(trace, make_setup(fill_arena=False), num_adapters=2, ranks=[4])

    # adapter 1 is warmed in idle room: its image is in the arena from the start, or not
    assert warm.found.tolist() == [Found.IN_ARENA, Found.RESIDENT, Found.RESIDENT, Found.BASE]
    assert cold.found.tolist() == [Found.MISSING, Found.RESIDENT, Found.MISSING, Found.BASE]
    assert fleet.engines[0].store.num_sent == 2
    assert cold.load_s[0] > warm.load_s[0] > 0
    summary = summarize(trace, cold, slo_ttft_s=1e9)
    assert (summary.resident_share, summary.arena_share, summary.miss_share) == pytest.approx((1 / 3, 0.0, 2 / 3))
    assert summary.attainment == 1.0


def test_affinity_keeps_an_adapter_on_the_engine_that_has_it() -> None:
    trace = make_trace([float(i) for i in range(12)], adapter=[i % 3 for i in range(12)])

    outcomes, _ = replay(trace, make_setup(), num_adapters=3, ranks=[4], num_engines=3)

    assert outcomes.found[0] == Found.IN_ARENA
    assert (outcomes.found[3:] == Found.RESIDENT).all()


def test_a_fleet_serves_a_burst_faster_than_one_engine() -> None:
    trace = make_trace([0.0] * 40, prompt_tokens=20, output_tokens=20)

    alone, _ = replay(trace, make_setup())
    shared, _ = replay(trace, make_setup(), num_engines=4)

    assert shared.end_s.max() < 0.35 * alone.end_s.max()


@given(
    first_s=st.floats(1e-4, 1.0),
    growth_s=st.one_of(st.just(0.0), st.floats(1e-9, 1e-2)),
    num_steps=st.integers(1, 400),
    share=st.floats(0.0, 1.5),
)
def test_a_stretch_is_cut_where_its_steps_begin(first_s: float, growth_s: float, num_steps: int, share: float) -> None:
    stretch = Stretch(first_s, growth_s, num_steps)
    span_s = share * stretch.total_s

    cut = stretch.cut(span_s)

    assert 1 <= cut.num_steps <= num_steps
    assert cut.num_steps == 1 or cut.last_begins_s < span_s
    if cut.num_steps < num_steps:
        assert cut.total_s >= span_s


def test_later_turns_repeat_what_earlier_ones_said() -> None:
    trace = make_trace([0.0, 1.0, 2.0], prompt_tokens=[4, 12, 4], output_tokens=4, conversation=[7, 7, -1])
    streams = TokenStreams(trace, 64)

    first, second, other = (streams.prompt(index) for index in range(3))

    assert second[:4].tolist() == first.tolist()
    answer = streams.tokens(np.array([0]), np.array([4], dtype=np.int32), 4)
    assert second[4:8].tolist() == answer[0].tolist()
    assert other.tolist() != first.tolist()


@pytest.mark.parametrize(
    ("arrivals", "columns"),
    [([], {}), ([1.0, 0.5], {}), ([float("nan")], {}), ([0.0], {"prompt_tokens": 0}), ([0.0], {"adapter": -2})],
)
def test_a_trace_that_makes_no_sense_is_refused(arrivals: list[float], columns: dict[str, int]) -> None:
    with pytest.raises(TraceError):
        make_trace(arrivals, **columns)


def test_the_simulator_runs_without_torch() -> None:
    code = (
        "import sys; from loraplex_engine.simulation import question, __main__; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'loraplex_kernels') for name in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
