"""Gaps that one look-up counts are in each histogram what Prometheus's own would have counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.vllm_metrics import ITL, TPOT
from loraplex_gateway.metrics.gaps import ITL_BUCKETS, GapMetrics
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

# Each bound, what is beside it, and what lies beyond all; in binary fractions too, whose sums have no rounding.
GAPS = st.sampled_from([0.0, 0.25, 0.5, 0.375, 1.0, 2.5, 2.625, 64.0, 128.0])
CHUNKS = st.lists(st.tuples(st.sampled_from(["first", "further", "resumed"]), st.integers(0, 3), GAPS), max_size=20)


def families(registry: CollectorRegistry) -> list[str]:
    return sorted(generate_latest(registry).decode().split("# HELP "))


@given(st.dictionaries(st.sampled_from("ab"), CHUNKS))
def test_all_histograms_show_what_their_own_counting_would_show(
    streams: dict[str, list[tuple[str, int, float]]],
) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    metrics = GapMetrics(ours)
    text = "Mean time between the tokens of one chunk and the next."
    chunks = Histogram("loraplex_gateway_itl_seconds", text, buckets=ITL_BUCKETS, registry=theirs)
    tokens = [Histogram(s.name, s.text, ["model_name"], buckets=s.buckets, registry=theirs) for s in (ITL, TPOT)]
    number = Counter("vllm:generation_tokens", "Tokens generated.", ["model_name"], registry=theirs)

    for model, events in streams.items():
        gaps = metrics.of(model)
        series = [histogram.labels(model) for histogram in tokens]
        number.labels(model).inc(sum(count for _, count, _ in events))
        for kind, count, gap_s in events:
            if kind == "first":
                gaps.first(count)
            else:
                getattr(gaps, kind)(count, gap_s)
            if kind == "further":
                chunks.observe(gap_s)
            for _ in range(count - 1 if kind == "first" else count):
                for histogram in series:
                    histogram.observe(0.0 if kind == "first" else gap_s)

    assert families(ours) == families(theirs)


def test_every_bound_of_the_gateways_own_histogram_is_one_of_vllms() -> None:
    assert set(ITL_BUCKETS) < set(ITL.buckets) == set(TPOT.buckets)


def test_a_gap_of_exactly_a_bound_counts_below_it_in_both() -> None:
    gaps = GapMetrics(CollectorRegistry()).of("m")

    for bound in ITL_BUCKETS:
        gaps.further(1, bound)

    assert gaps.by_chunk()[0] == [1] * len(ITL_BUCKETS) + [0]
    by_token = dict(gaps.by_token()[0])
    assert [by_token[str(bound)] for bound in ITL_BUCKETS] == list(range(1, len(ITL_BUCKETS) + 1))
