"""What the store tells Prometheus (docs/metrics.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.exposition import OTHER
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

MAX_LABEL_VALUES: Final = 1000


class StoreMetrics:
    """Counters and gauges of one store process.

    Attributes:
        fetches: Images obtained, by the tier they came from: ``host`` (image cache), ``disk``, or ``redis`` (canonical form).
        churn: Images pushed, dropped and refused.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.fetches = Counter("loraplex_store_fetch_total", "Images fetched.", ["tier"], registry=registry)
        self.fetch_bytes = Counter("loraplex_store_fetch_bytes_total", "Bytes fetched.", ["tier"], registry=registry)
        self.fetch_seconds = Histogram(
            "loraplex_store_fetch_seconds",
            "Time to fetch an image, by where it was found.",
            ["tier"],
            registry=registry,
        )
        self.push_bytes = Counter("loraplex_store_push_bytes_total", "Image bytes pushed.", ["path"], registry=registry)
        self.verify_failures = Counter(
            "loraplex_store_verify_failures_total",
            "Blobs, images or files of the disk cache that did not match their digest.",
            registry=registry,
        )
        self.churn = Counter("loraplex_store_churn_total", "Changes of residency.", ["action"], registry=registry)
        self.imports = Counter("loraplex_store_imports_total", "Imports by outcome.", ["outcome"], registry=registry)
        self.imports.labels("ok")
        self.resolutions = Counter(
            "loraplex_store_resolutions_total",
            "Requests of gateways to resolve a source, by outcome.",
            ["outcome"],
            registry=registry,
        )
        self.resolved_deletions = Counter(
            "loraplex_store_resolved_deletions_total",
            "Deletions of adapters that were resolved at request time, by cause.",
            ["cause"],
            registry=registry,
        )
        self.import_seconds = Histogram("loraplex_store_import_seconds", "Time of an import.", registry=registry)
        self.image_cache_bytes = Gauge(
            "loraplex_store_image_cache_bytes", "Host memory of cached page images.", registry=registry
        )
        self.engines = Gauge("loraplex_store_engines", "Engines attached to this replica.", registry=registry)


class ReplicaFactorCollector(Collector):
    """`loraplex_store_replica_factor{adapter}`: engines attached here that hold an adapter, at most 1000 series.

    Args:
        holders: Returns digest -> number of engines.
        name_of: Returns the name of a digest as a label.
    """

    def __init__(self, holders: Callable[[], Mapping[str, int]], name_of: Callable[[str], str]) -> None:
        self._holders = holders
        self._name_of = name_of

    def collect(self) -> Iterable[Metric]:
        """Yield one sample per adapter; beyond the cap the largest value stands for all ``other`` ones."""
        family = GaugeMetricFamily("loraplex_store_replica_factor", "Engines that hold an adapter.", labels=["adapter"])
        by_name: dict[str, int] = {}
        for digest, count in self._holders().items():
            name = self._name_of(digest)
            key = name if name in by_name or len(by_name) < MAX_LABEL_VALUES else OTHER
            by_name[key] = max(by_name.get(key, 0), count)
        for name, count in by_name.items():
            family.add_metric([name], count)
        yield family
