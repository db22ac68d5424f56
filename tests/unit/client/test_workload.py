"""Workloads are those that were published, and arrays all the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_client.workload import (
    NO_ADAPTER,
    NO_CONVERSATION,
    POPULARITIES,
    BurstyTenants,
    ConversationShape,
    SloraParams,
    Trace,
    burst,
    bursty_tenants,
    conversations,
    from_spec,
    merge,
    on_off_pair,
    poisson_rate,
    prompt_ids,
    punica_adapters,
    punica_sweep,
    slora_trace,
    steady_clients,
    zipf_adapters,
)
from loraplex_client.workload.popularity import group_sizes


def test_the_slora_trace_is_the_published_one_bit_for_bit() -> None:
    trace = slora_trace(SloraParams())

    assert (len(trace), trace.prompt_tokens.sum(), trace.output_tokens.sum()) == (1200, 314805, 315809)
    assert trace.arrival_s[-1] == pytest.approx(62.493458, abs=5e-7)
    hits = np.bincount(trace.adapter, minlength=200)
    assert (hits.min(), hits.max()) == (1, 12)
    assert trace.adapter[:5].tolist() == [74, 190, 146, 119, 31]
    assert trace.prompt_tokens[:5].tolist() == [388, 467, 14, 36, 402]
    assert trace.output_tokens[:5].tolist() == [268, 357, 509, 359, 15]
    assert trace.sha256() == "f9141b188d63f3eb9945a2deda61f9d7d06e85fa0e54368209c842eb121f2a1d"


@pytest.mark.parametrize(
    ("params", "prompt", "output", "last_s", "hit"),
    [
        (SloraParams(rate=10, duration_s=120, num_adapters=1000), 314805, 315809, 124.987, 704),
        (SloraParams(rate=10, duration_s=120, num_adapters=2000), 314805, 315809, 124.987, 907),
        (SloraParams(rate=10, duration_s=300), 796559, 758010, 284.943, 200),
        (SloraParams(rate=6, duration_s=300, num_adapters=400), 466980, 469301, 293.717, 396),
    ],
)
def test_the_slora_trace_has_the_check_values_of_other_settings(
    params: SloraParams, prompt: int, output: int, last_s: float, hit: int
) -> None:
    trace = slora_trace(params)

    assert (trace.prompt_tokens.sum(), trace.output_tokens.sum(), trace.num_adapters) == (prompt, output, hit)
    assert trace.arrival_s[-1] == pytest.approx(last_s, abs=5e-4)


def test_a_small_alpha_crowds_requests_at_low_adapters() -> None:
    uniform, crowded = slora_trace(SloraParams()), slora_trace(SloraParams(alpha=0.1))

    assert np.median(crowded.adapter) < 5 < 80 < np.median(uniform.adapter)


def test_without_adapters_the_same_requests_go_to_the_base_model() -> None:
    adapted, base = slora_trace(SloraParams()), slora_trace(SloraParams(num_adapters=0))

    assert (base.adapter == NO_ADAPTER).all()
    assert base.sha256() == adapted.without_adapters().sha256()


def test_a_burst_goes_round_the_adapters_at_once() -> None:
    trace = burst(3, 7)

    assert trace.adapter.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert not trace.arrival_s.any()
    assert (burst(0, 4).adapter == NO_ADAPTER).all()


def test_rate_draws_arrivals_then_adapters_from_one_legacy_generator() -> None:
    trace = poisson_rate(32, 20, 60)

    generator = np.random.RandomState(7)
    np.testing.assert_array_equal(trace.arrival_s, np.cumsum(generator.exponential(1 / 20, 1200)))
    np.testing.assert_array_equal(trace.adapter, generator.randint(0, 32, 1200))


def test_short_names_stand_for_their_workloads() -> None:
    assert from_spec("slora:200:1:20:1:60").sha256() == slora_trace(SloraParams()).sha256()
    assert from_spec("burst:200:512").sha256() == burst(200, 512).sha256()
    assert from_spec("rate:32:20:60").sha256() == poisson_rate(32, 20, 60).sha256()


@pytest.mark.parametrize("spec", ["burst:1", "burst:a:2", "slora:1:2", "", "storm:1:2", "slora:5:0:1:1:1"])
def test_a_malformed_short_name_is_refused_with_the_forms(spec: str) -> None:
    with pytest.raises(ValueError, match="burst:N:R"):
        from_spec(spec)


def test_prompts_depend_on_workload_and_request_alone() -> None:
    first = prompt_ids(2, 5, 64)

    np.testing.assert_array_equal(first, prompt_ids(2, 5, 64))
    assert (first >= 10).all()
    assert (first < 32000 - 10).all()
    assert not np.array_equal(first, prompt_ids(2, 6, 64))
    assert not np.array_equal(first, prompt_ids(3, 5, 64))


@given(popularity=st.sampled_from(POPULARITIES), num_requests=st.integers(1, 2000))
def test_popularity_groups_hold_every_request_most_popular_first(popularity: str, num_requests: int) -> None:
    sizes = group_sizes(popularity, num_requests)

    assert sum(sizes) == num_requests
    assert min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("popularity", "sizes"),
    [
        ("distinct", [1] * 32),
        ("uniform", [6, 6, 5, 5, 5, 5]),
        ("skewed", [11, 7, 5, 3, 2, 2, 1, 1]),  # 1 1 2 3 5 7 11 from 1.5 ** k, and the 2 left over
        ("identical", [32]),
    ],
)
def test_popularity_groups_are_punicas(popularity: str, sizes: list[int]) -> None:
    assert group_sizes(popularity, 32) == sizes
    assert np.bincount(punica_adapters(popularity, 32)).tolist() == sizes


def test_an_unknown_popularity_is_refused() -> None:
    with pytest.raises(ValueError, match="distinct, uniform, skewed, identical"):
        group_sizes("zipf", 4)


def test_punicas_sweep_has_its_bounds_and_the_same_lengths_for_every_popularity() -> None:
    traces = [punica_sweep(popularity) for popularity in POPULARITIES]

    for trace in traces:
        np.testing.assert_array_equal(trace.prompt_tokens, traces[0].prompt_tokens)
        assert len(trace) == 320
        assert trace.output_tokens.min() >= 2
        assert trace.max_total_tokens <= 2048
    assert [trace.num_adapters for trace in traces] == [320, 18, 13, 1]


def test_zipf_draws_follow_the_weights() -> None:
    drawn = zipf_adapters(100, 200_000, generator=np.random.default_rng(0))

    shares = np.bincount(drawn, minlength=100) / 200_000
    expected = 1 / np.arange(1, 101) / (1 / np.arange(1, 101)).sum()
    np.testing.assert_allclose(shares, expected, atol=4e-3)


def test_steady_clients_are_evenly_spaced() -> None:
    trace = steady_clients((1.5, 3.0), 360)

    assert np.bincount(trace.tenant).tolist() == [540, 1080]
    np.testing.assert_allclose(np.diff(trace.arrival_s[trace.tenant == 0]), 1 / 1.5)
    np.testing.assert_array_equal(trace.tenant, trace.adapter)


def test_the_first_client_of_an_on_off_pair_is_silent_in_odd_windows() -> None:
    trace = on_off_pair()

    window = (trace.arrival_s // 60).astype(int)
    assert np.bincount(window[trace.tenant == 0], minlength=10).tolist() == [120, 0] * 5
    assert np.bincount(window[trace.tenant == 1], minlength=10).tolist() == [180] * 10


def test_bursty_tenants_keep_their_rate_while_on_and_their_adapters() -> None:
    params = BurstyTenants(
        num_tenants=50, duration_s=2000, rate_on=2.0, mean_on_s=10, mean_off_s=40, adapters_per_tenant=3
    )

    trace = bursty_tenants(params)

    expected = 50 * 2000 * 2.0 * 0.2
    assert len(trace) == pytest.approx(expected, rel=0.05)
    np.testing.assert_array_equal(trace.adapter // 3, trace.tenant)
    gaps = np.concatenate([np.diff(trace.arrival_s[trace.tenant == tenant]) for tenant in range(50)])
    assert gaps.std() / gaps.mean() > 2  # a Poisson stream of the same rate has 1


def test_each_turn_begins_with_all_that_was_said_before() -> None:
    trace = conversations(ConversationShape(num_conversations=200, rate=2, num_adapters=20, system_tokens=32))

    assert trace.turn.max() > 3
    for conversation in range(200):
        turns = np.flatnonzero(trace.conversation == conversation)
        assert trace.turn[turns].tolist() == list(range(len(turns)))
        assert len(set(trace.adapter[turns].tolist())) == 1
        said = (trace.prompt_tokens + trace.output_tokens)[turns]
        assert trace.prefix_tokens[turns].tolist() == [0, *said[:-1].tolist()]
        assert (np.diff(trace.arrival_s[turns]) > 0).all()


def test_conversations_end_before_they_outgrow_the_model() -> None:
    shape = ConversationShape(num_conversations=300, rate=5, mean_turns=12, max_model_len=700)

    trace = conversations(shape)

    assert 600 < trace.max_total_tokens <= 700


def test_merging_keeps_order_conversations_and_tenants_apart() -> None:
    talk = conversations(ConversationShape(num_conversations=20, rate=2))
    noise = steady_clients((5.0,), 10)

    trace = merge(talk, noise, talk, separate_tenants=True)

    assert len(trace) == 2 * len(talk) + 50
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert len(np.unique(trace.conversation[trace.conversation != NO_CONVERSATION])) == 40
    assert len(np.unique(trace.tenant)) == 41


def test_rows_and_arrays_say_the_same() -> None:
    trace = slora_trace(SloraParams(duration_s=2))

    rows = list(trace)

    assert [row.prompt_tokens for row in rows] == trace.prompt_tokens.tolist()
    assert rows[7] == trace[7]
    assert trace[-1].index == len(trace) - 1
    with pytest.raises(IndexError):
        trace[len(trace)]


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": -2},
        {"tenant": -1},
        {"output_tokens": 0},
        {"prompt_tokens": 4, "prefix_tokens": 4},
        {"arrival_s": np.array([-1.0])},
    ],
)
def test_a_trace_of_impossible_requests_is_refused(fields: dict[str, object]) -> None:
    values: dict[str, object] = {"arrival_s": np.zeros(1), **fields}
    with pytest.raises(ValueError):
        Trace.of(**values)  # type: ignore[arg-type]


@settings(max_examples=20)
@given(factor=st.floats(0.1, 10))
def test_speeding_up_divides_arrivals(factor: float) -> None:
    trace = slora_trace(SloraParams(duration_s=2))

    np.testing.assert_allclose(trace.sped_up(factor).arrival_s * factor, trace.arrival_s)


def test_a_million_requests_are_arrays_of_tens_of_megabytes() -> None:
    trace = slora_trace(SloraParams(num_adapters=100_000, rate=5000, duration_s=200))

    columns = ("arrival_s", "adapter", "tenant", "prompt_tokens", "output_tokens", "conversation", "turn")
    assert len(trace) == 1_000_000
    assert sum(getattr(trace, name).nbytes for name in columns) < 50e6
    assert trace.num_adapters > 99_000
