"""Histograms that cost little per observation: they count in plain lists, and Prometheus's own form is made at a scrape.

A prometheus_client histogram takes a lock twice and looks at each of its buckets in turn, which for the gaps between tokens
would cost as much as writing them. All observations come from the event loop, and so do scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from prometheus_client import CollectorRegistry


class Tally:
    """The observations of one series.

    Args:
        bounds: Upper bounds of the buckets, rising, without infinity.
    """

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
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum


class TallyHistogram(Collector):
    """A histogram of cheap observations.

    Args:
        name: Name of the metric.
        text: What it tells.
        label_names: Its labels; a series is there once `labels` has been called, and at once without labels.
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
        self._name = name
        self._text = text
        self._label_names = label_names
        self._buckets = [bound for bound in buckets if bound != float("inf")]
        self._series: dict[tuple[str, ...], Tally] = {}
        if not label_names:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Tally:
        """Return the series of these labels' values."""
        if values not in self._series:
            self._series[values] = Tally(self._buckets)
        return self._series[values]

    def observe(self, value: float) -> None:
        """Count a value in the series without labels."""
        self._series[()].observe(value)

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Name the metric, so that a second one of its name is refused."""
        yield HistogramMetricFamily(self._name, self._text, labels=self._label_names)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Show the state of this moment."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._label_names)
        for values, tally in self._series.items():
            buckets, total = tally.read()
            family.add_metric(values, buckets, sum_value=total)
        yield family
