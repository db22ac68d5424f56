"""A Prometheus histogram that takes arrays: one call per step instead of one per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike
    from prometheus_client import CollectorRegistry


class ArrayHistogram(Collector):
    """Histogram without labels; not thread-safe.

    Args:
        name: Full metric name.
        text: Help text.
        buckets: Upper bounds, rising, without infinity.
        registry: The registry it is added to; None for a histogram that another collector shows.
    """

    def __init__(self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry | None) -> None:
        self._name = name
        self._text = text
        self._bounds = np.asarray(buckets, dtype=np.float64)
        self._counts = np.zeros(len(self._bounds) + 1, dtype=np.int64)
        self._sum = 0.0
        if registry is not None:
            registry.register(self)

    def observe(self, values: ArrayLike) -> None:
        """Count values; a scalar is an array of one."""
        array = np.atleast_1d(np.asarray(values, dtype=np.float64))
        if array.size:
            # A bucket holds values up to and including its bound.
            np.add.at(self._counts, np.searchsorted(self._bounds, array, side="left"), 1)
            self._sum += float(array.sum())

    @property
    def count(self) -> int:
        """Number of values counted so far."""
        return int(self._counts.sum())

    def samples(self) -> tuple[list[tuple[str, float]], float]:
        """Return ``[(upper bound, cumulative count)]`` with ``+Inf`` last, and the sum."""
        bounds = [*(repr(bound) for bound in self._bounds.tolist()), "+Inf"]
        return list(zip(bounds, np.cumsum(self._counts).astype(float).tolist(), strict=True)), self._sum

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return the histogram as a metric."""
        buckets, total = self.samples()
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=total)
