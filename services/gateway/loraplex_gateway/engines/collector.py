"""A gateway's engines as one, in the gauges that routers read; collected when a scrape asks.

Routers take the first series of a gauge and the newest of ``lora_requests_info`` (Gateway API Inference Extension, llm-d),
so there is one series per base model, summed over its engines, and one list of adapters.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.exposition import OTHER
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from loraplex_gateway.engines.link import EngineLink
from loraplex_gateway.engines.link_state import LinkState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from loraplex_common.adapter_names import AdapterNames

    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.text.models import ModelCatalog, ServedModel

MAX_ADAPTER_LABELS: Final = 1000
ON_DEVICE: Final = "gpu"


@dataclass(frozen=True, slots=True)
class _Fleet:
    """The engines of one base model that this gateway has a session with."""

    model: str
    links: Sequence[EngineLink]

    @property
    def resident(self) -> set[str]:
        return set().union(*(link.resident for link in self.links))

    @property
    def in_flight(self) -> set[str]:
        return set().union(*(link.digests_in_flight for link in self.links))

    @property
    def running(self) -> int:
        return sum(link.report.running for link in self.links)

    @property
    def waiting(self) -> int:
        return sum(link.report.waiting for link in self.links)

    @property
    def usage(self) -> float:
        """Share of the pools that cannot be had by eviction."""
        reports = [link.report for link in self.links]
        total = sum(report.pages_total for report in reports)
        return sum(report.pages_kv + report.pages_pinned for report in reports) / total if total else 0.0

    @property
    def room(self) -> int:
        """How many adapters of the usual size all engines could hold."""
        return sum(_room(link) for link in self.links)

    def layouts(self) -> dict[int, int]:
        """Return pages by tokens of a block."""
        layouts: dict[int, int] = {}
        for record in (link.record for link in self.links):
            layouts[record.block_tokens] = layouts.get(record.block_tokens, 0) + record.num_pages
        return layouts


class FleetCollector(Collector):
    """Gauges of all engines that a gateway knows.

    Args:
        catalog: Base models.
        pool: The engines.
        names: What adapters are called.
        num_waiting: Requests that wait on the gateway, by base model.
    """

    def __init__(
        self, catalog: ModelCatalog, pool: EnginePool, names: AdapterNames, num_waiting: Mapping[str, int]
    ) -> None:
        self._catalog = catalog
        self._pool = pool
        self._names = names
        self._num_waiting = num_waiting
        self._lists: tuple[str, str] | None = None
        self._changed_at = 0.0

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Show the state of this moment."""
        fleets = [self._fleet(model) for model in self._catalog.models]
        yield _gauge("vllm:num_requests_running", "Requests in a batch.", {f.model: f.running for f in fleets})
        waiting = {fleet.model: fleet.waiting + self._num_waiting.get(fleet.model, 0) for fleet in fleets}
        yield _gauge("vllm:num_requests_waiting", "Requests waiting, on engines and on this gateway.", waiting)
        text = "Share of the pool that cannot be had by eviction, 0 to 1."
        yield _gauge("vllm:kv_cache_usage_perc", text, {fleet.model: fleet.usage for fleet in fleets})
        yield _cache_config(fleets)
        yield self._engines(fleets)
        yield self._lora_info(fleets)
        yield self._loaded(fleets)
        text = "Adapters on the device of some engine."
        yield _gauge("vllm:num_gpu_loaded_lora_adapters", text, {f.model: len(f.resident) for f in fleets})
        text = "Adapters that fit on the devices."
        yield _gauge("vllm:max_gpu_lora_adapters", text, {fleet.model: fleet.room for fleet in fleets})

    def _engines(self, fleets: Sequence[_Fleet]) -> GaugeMetricFamily:
        counts = Counter(
            (fleet.model, link.record.numerics, "false" if self._pool.passed_over(link.record) else "true")
            for fleet in fleets
            for link in fleet.links
        )
        family = GaugeMetricFamily(
            "loraplex_gateway_engines",
            "Engines by what loading did to their numbers, and whether they get new requests.",
            labels=["model_name", "numerics", "is_used"],
        )
        for labels, count in sorted(counts.items()):
            family.add_metric(labels, count)
        return family

    def _fleet(self, model: ServedModel) -> _Fleet:
        links = [
            link
            for link in self._pool.links
            if link.record.base_fingerprint == model.fingerprint and link.state is LinkState.OPEN
        ]
        return _Fleet(model.name, links)

    def _lora_info(self, fleets: Sequence[_Fleet]) -> GaugeMetricFamily:
        resident: set[str] = set().union(*(fleet.resident for fleet in fleets))
        in_flight: set[str] = set().union(*(fleet.in_flight for fleet in fleets))
        running = sorted(resident, key=lambda digest: (digest not in in_flight, digest))
        lists = (",".join(self._names.listed(running)), ",".join(self._names.listed(sorted(in_flight - resident))))
        if lists != self._lists:
            self._lists, self._changed_at = lists, time.time()
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on a device and adapters waited for; the value is the time of the last change.",
            labels=["model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        models = ",".join(fleet.model for fleet in fleets)
        family.add_metric([models, str(sum(fleet.room for fleet in fleets)), *lists], self._changed_at)
        return family

    def _loaded(self, fleets: Sequence[_Fleet]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each name of each adapter on a device; beyond the first 1000, and for those without a name, one `other` "
            "with their number.",
            labels=["model_name", "adapter_name", "level"],
        )
        for fleet in fleets:
            num_shown = num_other = 0
            for digest in sorted(fleet.resident):
                names = self._names.of(digest)
                if not names or num_shown + len(names) > MAX_ADAPTER_LABELS:
                    num_other += 1
                    continue
                num_shown += len(names)
                for name in names:
                    family.add_metric([fleet.model, name, ON_DEVICE], 1)
            if num_other:
                family.add_metric([fleet.model, OTHER, ON_DEVICE], num_other)
        return family


def _gauge(name: str, text: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["model_name"])
    for model, value in values.items():
        family.add_metric([model], value)
    return family


def _cache_config(fleets: Sequence[_Fleet]) -> GaugeMetricFamily:
    labels = ["model_name", "block_size", "num_gpu_blocks"]
    family = GaugeMetricFamily("vllm:cache_config_info", "Layout of the pools.", labels=labels)
    for fleet in fleets:
        for block_tokens, num_pages in fleet.layouts().items():
            family.add_metric([fleet.model, str(block_tokens), str(num_pages)], 1)
    return family


def _room(link: EngineLink) -> int:
    report = link.report
    pages = report.pages_adapter + report.pages_pinned
    return report.pages_total * report.adapters_resident // pages if pages else report.pages_total
