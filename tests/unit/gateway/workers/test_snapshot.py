"""Several workers' metrics become one gateway's: what is counted adds up, what all of them are told is told once."""

from __future__ import annotations

from typing import Any

from loraplex_gateway.workers.snapshot import Family, MergedMetrics, Snapshot, snapshot_of
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


def worker(*, served: int, waiting_here: int, running: int, since: float, lists: tuple[str, str]) -> Snapshot:
    """Return the metrics of a worker that knows of `running` requests on the engines and of 3 that wait there."""
    registry = CollectorRegistry()
    Counter("requests", "R.", ["code"], registry=registry).labels("OK").inc(served)
    seconds = Histogram("seconds", "S.", buckets=(1.0,), registry=registry)
    for _ in range(served):
        seconds.observe(0.5)
    Gauge("process_start_time_seconds", "P.", registry=registry).set(since)
    Gauge("loraplex_gateway_queue_size", "Q.", ["priority"], registry=registry).labels("normal").set(waiting_here)
    Gauge("vllm:num_requests_running", "N.", ["model_name"], registry=registry).labels("m").set(running)
    Gauge("vllm:num_requests_waiting", "W.", ["model_name"], registry=registry).labels("m").set(3 + waiting_here)
    names = ["model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    Gauge("vllm:lora_requests_info", "L.", names, registry=registry).labels("m", "8", *lists).set(since)
    return snapshot_of(registry, {"m": waiting_here})


def merged(*snapshots: Snapshot) -> dict[str, Any]:
    """Return sample name -> value, or labels and value where there are labels to look at."""
    metrics = MergedMetrics()
    metrics.snapshots = list(snapshots)
    samples = [sample for metric in metrics.collect() for sample in metric.samples]
    assert len({(sample.name, tuple(sample.labels.items())) for sample in samples}) == len(samples)
    return {sample.name: (sample.labels, sample.value) for sample in samples}


FIRST = worker(served=2, waiting_here=1, running=5, since=100.0, lists=("a,b", "c"))
SECOND = worker(served=3, waiting_here=4, running=6, since=200.0, lists=("b,a", "d,a"))


def test_counts_and_histograms_add_up() -> None:
    metrics = merged(FIRST, SECOND)

    assert metrics["requests_total"] == ({"code": "OK"}, 5.0)
    assert metrics["seconds_count"][1] == 5.0
    assert metrics["seconds_sum"][1] == 2.5


def test_queues_add_up_and_the_load_of_engines_is_told_once() -> None:
    metrics = merged(FIRST, SECOND)

    assert metrics["loraplex_gateway_queue_size"][1] == 5.0
    assert metrics["vllm:num_requests_running"][1] == 6.0
    assert metrics["vllm:num_requests_waiting"][1] == 3 + 1 + 4
    assert metrics["process_start_time_seconds"][1] == 100.0


def test_there_is_one_list_of_adapters_with_all_that_any_worker_waits_for() -> None:
    labels, value = merged(FIRST, SECOND)["vllm:lora_requests_info"]

    assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"], value) == ("b,a", "d,c", 200.0)


def test_of_a_worker_that_has_ended_what_only_grows_stays() -> None:
    metrics = merged(SECOND, FIRST.lasting)

    assert metrics["requests_total"][1] == 5.0
    assert metrics["loraplex_gateway_queue_size"][1] == 4.0
    assert metrics["vllm:num_requests_waiting"][1] == 3 + 4


def test_snapshots_keep_the_kinds_of_metrics() -> None:
    metrics = MergedMetrics()
    metrics.snapshots = [FIRST, SECOND]

    kinds = {family.name: family.kind for family in metrics.snapshot().families}

    assert kinds == {family.name: family.kind for family in FIRST.families}
    assert all(isinstance(family, Family) for family in metrics.snapshot().families)
