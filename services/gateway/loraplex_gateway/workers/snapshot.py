"""The metrics of one worker at one moment, and those of all as if they were one gateway's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import CollectorRegistry

# What a gauge of all workers is, where it is not their greatest value: engines tell each worker of the same load.
SUMS: Final = frozenset(
    {
        "loraplex_gateway_queue_size",
        "loraplex_gateway_fairness_counter",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
    }
)
LEASTS: Final = frozenset({"process_start_time_seconds", "process_max_fds", "loraplex_gateway_jains_index"})
WAITING: Final = "vllm:num_requests_waiting"
LORA_INFO: Final = "vllm:lora_requests_info"
_MODEL: Final = "model_name"


class Family(msgspec.Struct, frozen=True, array_like=True):
    """One metric: its samples are name, labels and value."""

    name: str
    text: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


class Snapshot(msgspec.Struct, frozen=True):
    """A worker's metrics.

    Attributes:
        families: All of them; label values that only some scrapers may see are still marked.
        waiting: Requests that wait for a place on the worker, by base model: `vllm:num_requests_waiting` without engines.
    """

    families: list[Family]
    waiting: dict[str, int]

    @property
    def lasting(self) -> Snapshot:
        """What remains of a worker that has ended: what only ever grows."""
        return Snapshot([family for family in self.families if family.kind in ("counter", "histogram")], {})


def snapshot_of(registry: Collector | CollectorRegistry, waiting: Mapping[str, int]) -> Snapshot:
    """Return the present state of a registry."""
    families = [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            [(sample.name, dict(sample.labels), sample.value) for sample in metric.samples],
        )
        for metric in registry.collect()
    ]
    return Snapshot(families, dict(waiting))


class MergedMetrics(Collector):
    """Shows snapshots of several workers as one gateway's metrics.

    Attributes:
        snapshots: Those of the workers that run, and what remains of those that have ended.
    """

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def collect(self) -> Iterator[Metric]:
        """Merge what is there."""
        by_name: dict[str, list[Family]] = {}
        for snapshot in self.snapshots:
            for family in snapshot.families:
                by_name.setdefault(family.name, []).append(family)
        for name, families in by_name.items():
            metric = Metric(name, families[0].text, families[0].kind)
            metric.samples = list(self._samples(name, families))
            yield metric

    def snapshot(self) -> Snapshot:
        """Return what is there as one."""
        return snapshot_of(self, {})

    def _samples(self, name: str, families: list[Family]) -> Iterable[Sample]:
        if name == LORA_INFO:
            return _lora_info(families)
        if name == WAITING:
            return self._waiting()
        return _merged(families, _rule(name, families[0].kind))

    def _waiting(self) -> Iterable[Sample]:
        """Return the load of the engines, which all workers know, and the requests of each worker's own queue."""
        engines: dict[str, float] = {}
        own: dict[str, int] = {}
        for snapshot in self.snapshots:
            for model, count in snapshot.waiting.items():
                own[model] = own.get(model, 0) + count
            for family in snapshot.families:
                for _, labels, value in family.samples if family.name == WAITING else ():
                    model = labels[_MODEL]
                    there = value - snapshot.waiting.get(model, 0)
                    engines[model] = max(engines.get(model, 0.0), there)
        return [Sample(WAITING, {_MODEL: model}, value + own.get(model, 0)) for model, value in engines.items()]


def _rule(name: str, kind: str) -> Callable[[float, float], float]:
    if kind in ("counter", "histogram") or name in SUMS:
        return float.__add__
    return min if name in LEASTS else max


def _merged(families: list[Family], rule: Callable[[float, float], float]) -> Iterable[Sample]:
    merged: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in families:
        for name, labels, value in family.samples:
            key = (name, tuple(labels.items()))
            before = merged.get(key, math.nan)
            merged[key] = float(value) if math.isnan(before) else rule(before, float(value))
    return [Sample(name, dict(labels), value) for (name, labels), value in merged.items()]


def _lora_info(families: list[Family]) -> Iterable[Sample]:
    """Return one sample: what any worker waits for, and the time of the last change that any has seen."""
    samples = sorted((sample for family in families for sample in family.samples), key=lambda sample: -sample[2])
    if not samples:
        return
    name, newest, value = samples[0]
    lists: dict[str, str] = {}
    running = _union(labels["running_lora_adapters"] for _, labels, _ in samples)
    waiting = _union(labels["waiting_lora_adapters"] for _, labels, _ in samples)
    lists["running_lora_adapters"] = ",".join(running)
    lists["waiting_lora_adapters"] = ",".join(adapter for adapter in waiting if adapter not in running)
    yield Sample(name, {**newest, **lists}, value)


def _union(lists: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(adapter for text in lists for adapter in text.split(",") if adapter)
