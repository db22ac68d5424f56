"""Cheap counters and histograms show what Prometheus's own would."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex_common.tally import RisingGauge, TallyCounter, TallyHistogram
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable

BUCKETS = (0.5, 1.0, 2.0)
VALUES = st.sampled_from([0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0])  # binary fractions: their sums have no rounding


def page(observe: Callable[[CollectorRegistry], None]) -> list[str]:
    registry = CollectorRegistry()
    observe(registry)
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.tuples(st.sampled_from("ab"), VALUES, st.integers(0, 3))))
def test_it_shows_what_prometheus_own_histogram_shows(observations: list[tuple[str, float, int]]) -> None:
    def cheap(registry: CollectorRegistry) -> None:
        histogram = TallyHistogram("h", "Text.", ["model"], buckets=BUCKETS, registry=registry)
        for label, value, count in observations:
            histogram.labels(label).observe(value, count)

    def usual(registry: CollectorRegistry) -> None:
        histogram = Histogram("h", "Text.", ["model"], buckets=BUCKETS, registry=registry)
        for label, value, count in observations:
            series = histogram.labels(label)
            for _ in range(count):
                series.observe(value)

    assert page(cheap) == page(usual)


def test_a_second_metric_of_its_name_is_refused() -> None:
    registry = CollectorRegistry()
    TallyHistogram("h", "Text.", (), buckets=BUCKETS, registry=registry)

    with pytest.raises(ValueError, match="h"):
        Histogram("h", "Text.", registry=registry)


@pytest.mark.parametrize(("cheap", "usual"), [(TallyCounter, Counter), (RisingGauge, Gauge)])
@given(amounts=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3))))
def test_a_counter_shows_what_prometheus_own_counter_shows(
    cheap: type[TallyCounter], usual: type[Counter], amounts: list[tuple[str, int]]
) -> None:
    def count(kind: type[TallyCounter] | type[Counter], registry: CollectorRegistry) -> None:
        by_label = kind("c_total", "Text.", ["kind"], registry=registry)
        whole = kind("whole", "All.", registry=registry)
        for label, amount in amounts:
            by_label.labels(label).inc(amount)
            whole.inc(amount)

    assert page(lambda registry: count(cheap, registry)) == page(lambda registry: count(usual, registry))


@pytest.mark.parametrize("values", [(), ("a", "b")])
def test_a_series_without_exactly_the_metrics_labels_is_refused(values: tuple[str, ...]) -> None:
    counter = TallyCounter("c", "Text.", ["kind"], registry=CollectorRegistry())

    with pytest.raises(ValueError, match=r"c has the labels \['kind'\]"):
        counter.labels(*values)


def test_a_counter_that_would_fall_is_refused() -> None:
    counter = TallyCounter("c", "Text.", registry=CollectorRegistry())

    with pytest.raises(ValueError, match="cannot fall, by 2"):
        counter.inc(-2)
