"""The engine's state as gauges, read when Prometheus asks."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Final

from loraplex_common.exposition import OTHER
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from loraplex_engine.messages import ResidencyChanged, ResidencyState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loraplex_common.adapter_names import AdapterNames

    from loraplex_engine.loop.engine import Engine
    from loraplex_engine.loop.load_report import LoadSnapshot
    from loraplex_engine.loop.residency_feed import ResidencyFeed
    from loraplex_engine.loop.totals import LoopTotals
    from loraplex_engine.metrics.residency import ResidencyMetrics

MAX_ADAPTER_LABELS: Final = 1000
_ON_DEVICE: Final = (ResidencyState.RESIDENT, ResidencyState.DRAINING)


class EngineCollector(Collector):
    """Gauges of one engine.

    Args:
        engine: The engine whose load is shown.
        feed: The states of its adapters.
        residency: The time of the last change of residency.
        names: Names of its adapters.
    """

    def __init__(self, engine: Engine, feed: ResidencyFeed, residency: ResidencyMetrics, names: AdapterNames) -> None:
        self._engine = engine
        self._feed = feed
        self._residency = residency
        self._names = names

    def collect(self) -> Iterator[Metric]:
        """Return the gauges of this moment."""
        load, held = self._engine.snapshot(), self._feed.held
        yield _gauge("vllm:num_requests_running", "Requests in a batch.", load.running)
        yield _gauge("vllm:num_requests_waiting", "Requests waiting.", load.waiting)
        usage = (load.pages_kv + load.pages_pinned) / load.pages_total
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the pool that cannot be had by eviction, 0 to 1.", usage)
        yield self._cache_config()
        yield _numerics(self._engine.limits.numerics)
        yield from self._lora(load, held)
        pages = GaugeMetricFamily("loraplex_engine_pool_pages", "Pages of the pool by owner.", labels=["owner"])
        for owner, count in (
            ("kv", load.pages_kv),
            ("adapter", load.pages_adapter),
            ("pinned", load.pages_pinned),
            ("cached", load.pages_cached),
            ("free", load.pages_free - load.pages_cached),
        ):
            pages.add_metric([owner], count)
        yield pages
        yield from self._page_seconds()
        yield _gauge("loraplex_engine_leases", "Leases of running requests on adapters.", self._engine.num_leases)
        yield from self._steps()

    def _page_seconds(self) -> Iterator[CounterMetricFamily]:
        text = "Pages of the pool by owner, times the seconds that they were held."
        family = CounterMetricFamily("loraplex_engine_page_seconds", text, labels=["owner"])
        for owner, page_seconds in self._engine.page_seconds.items():
            family.add_metric([owner], page_seconds)
        yield family
        text = "Of the adapters' page-seconds, those in which running requests used them."
        yield CounterMetricFamily("loraplex_engine_leased_page_seconds", text, value=self._engine.leased_page_seconds)

    def _steps(self) -> Iterator[Metric]:
        totals, counters = self._engine.totals, self._engine.counters
        yield CounterMetricFamily(
            "vllm:num_preemptions", "Requests whose pages were taken away.", value=counters.num_preemptions
        )
        yield from self._policies()
        seconds = SummaryMetricFamily("loraplex_engine_step_seconds", "The step loop's time.", labels=["phase"])
        for phase in ("schedule", "launch", "wait", "update"):
            seconds.add_metric([phase], totals.num_steps, getattr(totals, f"{phase}_s"))
        yield seconds
        yield _summary("loraplex_engine_step_tokens", "Tokens computed per step.", totals.num_steps, totals.num_tokens)
        yield _iterations(totals)
        yield _summary("loraplex_engine_adapters_in_batch", "Adapters per step.", totals.num_steps, totals.num_adapters)

    def _policies(self) -> Iterator[Metric]:
        counters, warm = self._engine.counters, self._engine.warm
        for name, text, value in (
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", counters.num_looked_up_tokens),
            ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", counters.num_cached_tokens),
            ("loraplex_engine_evicted_blocks", "Cached blocks that gave way.", self._engine.num_evicted_blocks),
            (
                "loraplex_engine_early_aborts",
                "Requests ended as hopeless before their time.",
                counters.num_early_aborts,
            ),
        ):
            yield CounterMetricFamily(name, text, value=value)
        page_bytes = self._engine.limits.page_bytes
        warmed = CounterMetricFamily(
            "loraplex_engine_warm_bytes",
            "Bytes of adapters loaded before anybody asked, by what became of them.",
            labels=["result"],
        )
        for result, num_pages in (
            ("useful", warm.num_useful_pages),
            ("late", warm.num_late_pages),
            ("wasted", warm.num_wasted_pages),
        ):
            warmed.add_metric([result], num_pages * page_bytes)
        yield warmed
        costs = GaugeMetricFamily("loraplex_engine_cost_seconds", "What things take, as measured.", labels=["of"])
        for of, seconds in self._engine.measured_costs.items():
            costs.add_metric([of], seconds)
        yield costs

    def _cache_config(self) -> GaugeMetricFamily:
        limits = self._engine.limits
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Layout of the pool.", labels=["block_size", "num_gpu_blocks"]
        )
        family.add_metric([str(limits.block_tokens), str(limits.num_pages)], 1)
        return family

    def _lora(self, load: LoadSnapshot, held: list[ResidencyChanged]) -> Iterator[GaugeMetricFamily]:
        resident = _leased_first(event for event in held if event.state is ResidencyState.RESIDENT)
        waiting = self._feed.in_state(ResidencyState.WANTED, ResidencyState.IN_ARENA, ResidencyState.LOADING)
        room = self._max_adapters(load, held)
        # One sample, made anew each time: a labelled Gauge would keep a series per permutation.
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device and adapters waited for; the value is the time of the last change.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        lists = [",".join(self._names.listed(digests)) for digests in (resident, waiting)]
        info.add_metric([str(room), *lists], max(self._residency.changed_at, self._names.changed_at))
        yield info
        yield self._loaded(held)
        on_device = sum(event.state in _ON_DEVICE for event in held)
        yield _gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters on the device.", on_device)
        yield _gauge("vllm:num_cpu_loaded_lora_adapters", "Adapters in the host arena only.", len(held) - on_device)
        yield _gauge("vllm:max_gpu_lora_adapters", "Adapters that fit on the device.", room)

    def _loaded(self, held: list[ResidencyChanged]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each name of each adapter held; beyond the first 1000, and for those without a name, one `other` with "
            "their number.",
            labels=["adapter_name", "level", "pinned", "rank"],
        )
        num_shown = num_other = 0
        for event in held:
            names = self._names.of(event.digest)
            if not names or num_shown + len(names) > MAX_ADAPTER_LABELS:
                num_other += 1
                continue
            num_shown += len(names)
            level = "gpu" if event.state in _ON_DEVICE else "cpu"
            for name in names:
                family.add_metric([name, level, str(event.is_pinned).lower(), str(event.max_rank)], 1)
        if num_other:
            family.add_metric([OTHER, OTHER, OTHER, OTHER], num_other)
        return family

    @staticmethod
    def _max_adapters(load: LoadSnapshot, held: list[ResidencyChanged]) -> int:
        """Return how many adapters of the usual size the pool could hold; only pages limit the number."""
        sizes = [event.num_pages for event in held if event.num_pages]
        return load.pages_total * len(sizes) // sum(sizes) if sizes else load.pages_total


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _numerics(numerics: str) -> GaugeMetricFamily:
    text = "1, with what loading did to the base model's numbers."
    family = GaugeMetricFamily("loraplex_engine_numerics_info", text, labels=["numerics"])
    family.add_metric([numerics], 1)
    return family


def _summary(name: str, text: str, count: int, total: float) -> SummaryMetricFamily:
    return SummaryMetricFamily(name, text, count_value=count, sum_value=total)


def _leased_first(events: Iterable[ResidencyChanged]) -> list[str]:
    return [event.digest for event in sorted(events, key=lambda event: (event.num_leases == 0, event.digest))]


def _iterations(totals: LoopTotals) -> HistogramMetricFamily:
    sizes = list(totals.step_sizes)  # a copy, as the loop goes on counting
    bounds = [*(repr(float(2**power)) for power in range(len(sizes) - 1)), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(sizes)), strict=True))
    return HistogramMetricFamily(
        "vllm:iteration_tokens_total", "Tokens computed per step.", buckets=buckets, sum_value=totals.num_tokens
    )
