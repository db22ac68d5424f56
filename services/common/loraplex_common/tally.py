"""Metrics that cost little to count: they count in plain numbers, and Prometheus's own form is made at a scrape.

A counter of prometheus_client takes a lock, a look-up of its labels another, and a histogram two while it looks at each of its
buckets in turn: for what is counted with each request and each token, that would cost as much as writing them. All counting
comes from the event loop, and so do scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

_Series = TypeVar("_Series")


class Tally:
    """The observations of one series.

    Args:
        bounds: Upper bounds of the buckets, rising, without infinity.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, as many times as `count` says."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Return (upper bound, observations up to it) for each bucket, and the sum of all values."""
        return cumulated(self._bounds, self._counts), self._sum


class Count:
    """The number of one series.

    Attributes:
        value: It.
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Let it rise.

        Raises:
            ValueError: If it would fall, which Prometheus takes for a restart.
        """
        if amount < 0:
            raise ValueError(f"a counter cannot fall, by {-amount:g}")
        self.value += amount


def cumulated(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return (upper bound, observations up to it) for each bucket, given its own observations; the last one has no bound."""
    names = [*map(floatToGoString, bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))


class _Tallied(Collector, Generic[_Series]):
    """A metric and its series; one is there once `labels` has been called, and at once without labels."""

    def __init__(
        self,
        name: str,
        text: str,
        label_names: Sequence[str],
        *,
        new: Callable[[], _Series],
        registry: CollectorRegistry,
    ) -> None:
        self._name = name
        self._text = text
        self._label_names = label_names
        self._new = new
        self._series: dict[tuple[str, ...], _Series] = {}
        if not label_names:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> _Series:
        """Return the series of these labels' values.

        Raises:
            ValueError: If there are not as many as the metric has labels.
        """
        found = self._series.get(values)
        if found is None:
            if len(values) != len(self._label_names):
                raise ValueError(f"{self._name} has the labels {list(self._label_names)}, not {len(values)}")
            found = self._series[values] = self._new()
        return found


class TallyCounter(_Tallied[Count]):
    """A counter that is cheap to raise.

    Args:
        name: Name of the metric; the suffix ``_total`` is added where it lacks.
        text: What it tells.
        label_names: Its labels.
        registry: Where it is registered.
    """

    def __init__(self, name: str, text: str, label_names: Sequence[str] = (), *, registry: CollectorRegistry) -> None:
        super().__init__(name, text, label_names, new=Count, registry=registry)

    def inc(self, amount: float = 1) -> None:
        """Raise the series without labels."""
        self._series[()].inc(amount)

    def describe(self) -> Iterator[Metric]:
        """Name the metric, so that a second one of its name is refused."""
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        """Show the state of this moment."""
        family = self._family()
        for values, count in self._series.items():
            family.add_metric(values, count.value)
        yield family

    def _family(self) -> CounterMetricFamily | GaugeMetricFamily:
        return CounterMetricFamily(self._name, self._text, labels=self._label_names)


class RisingGauge(TallyCounter):
    """The same as a gauge by type, whose name gets no suffix."""

    def _family(self) -> GaugeMetricFamily:
        return GaugeMetricFamily(self._name, self._text, labels=self._label_names)


class TallyHistogram(_Tallied[Tally]):
    """A histogram of cheap observations.

    Args:
        name: Name of the metric.
        text: What it tells.
        label_names: Its labels.
        buckets: Upper bounds, rising, without infinity.
        registry: Where it is registered.
    """

    def __init__(
        self,
        name: str,
        text: str,
        label_names: Sequence[str],
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        bounds = [bound for bound in buckets if bound != float("inf")]
        super().__init__(name, text, label_names, new=lambda: Tally(bounds), registry=registry)

    def observe(self, value: float) -> None:
        """Count a value in the series without labels."""
        self._series[()].observe(value)

    def describe(self) -> Iterator[Metric]:
        """Name the metric, so that a second one of its name is refused."""
        yield HistogramMetricFamily(self._name, self._text, labels=self._label_names)

    def collect(self) -> Iterator[Metric]:
        """Show the state of this moment."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._label_names)
        for values, tally in self._series.items():
            buckets, total = tally.read()
            family.add_metric(values, buckets, sum_value=total)
        yield family
