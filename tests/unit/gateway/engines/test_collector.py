"""Many engines become one series per base model, as routers read them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from loraplex.v1 import engine_pb2
from loraplex_common.adapter_names import AdapterNames
from loraplex_common.alias_feed import AdapterEntry
from loraplex_gateway.engines.collector import MAX_ADAPTER_LABELS, FleetCollector
from loraplex_gateway.engines.link_state import LinkState
from prometheus_client import CollectorRegistry

if TYPE_CHECKING:
    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.text.models import ModelCatalog

MODELS = [SimpleNamespace(name="llama", fingerprint="f1"), SimpleNamespace(name="qwen", fingerprint="f2")]


def link(fingerprint: str, *, resident: set[str] | None = None, **report: Any) -> Any:
    return SimpleNamespace(
        record=SimpleNamespace(base_fingerprint=fingerprint, block_tokens=16, num_pages=100, numerics="bf16"),
        state=LinkState.OPEN,
        report=engine_pb2.LoadReport(pages_total=100, **report),
        resident=resident or set(),
        digests_in_flight=frozenset({"wanted"}),
    )


def collect(links: list[Any], names: AdapterNames | None = None, **waiting: int) -> CollectorRegistry:
    catalog = cast("ModelCatalog", SimpleNamespace(models=MODELS))
    pool = cast("EnginePool", SimpleNamespace(links=links, passed_over=lambda _: ""))
    registry = CollectorRegistry()
    registry.register(FleetCollector(catalog, pool, names or AdapterNames(), waiting))
    return registry


def test_loads_are_summed_by_base_model_and_what_waits_on_the_gateway_is_added() -> None:
    lost = link("f1", running=50)
    lost.state = LinkState.CONNECTING
    registry = collect(
        [
            link("f1", running=3, waiting=1, pages_kv=50, pages_pinned=10),
            link("f1", running=4, waiting=2),
            link("f2", running=7, waiting=0, pages_kv=100),
            lost,
        ],
        llama=5,
    )

    def value(name: str, model: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:{name}", {"model_name": model, **labels})

    assert [value("num_requests_running", model) for model in ("llama", "qwen")] == [7, 7]
    assert [value("num_requests_waiting", model) for model in ("llama", "qwen")] == [8, 0]
    assert [value("kv_cache_usage_perc", model) for model in ("llama", "qwen")] == [0.3, 1.0]
    assert value("cache_config_info", "llama", block_size="16", num_gpu_blocks="200") == 1


def test_the_lists_of_adapters_are_one_sample_whose_time_moves_with_them() -> None:
    names = AdapterNames()
    names.update([AdapterEntry(name=name, labels={"latest": name}) for name in ("held", "wanted", "gone")])
    holder = link("f1", resident={"held"}, adapters_resident=1, pages_adapter=10)
    registry = collect([holder, link("f2")], names)

    def info() -> list[tuple[dict[str, str], float]]:
        families = [family for family in registry.collect() if family.name == "vllm:lora_requests_info"]
        return [(sample.labels, sample.value) for family in families for sample in family.samples]

    ((labels, first_at),) = info()
    assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("held", "wanted")
    assert labels["max_lora"] == str(10 + 100)
    assert info()[0][1] == first_at
    holder.resident.add("wanted")
    ((labels, second_at),) = info()
    assert (labels["running_lora_adapters"], labels["waiting_lora_adapters"]) == ("wanted,held", "")
    assert second_at > first_at


def test_adapters_beyond_the_cap_and_nameless_ones_are_counted_together() -> None:
    names = AdapterNames()
    digests = {f"d{number}" for number in range(MAX_ADAPTER_LABELS + 5)}
    names.update([AdapterEntry(name=f"n-{digest}", labels={"latest": digest}) for digest in digests])
    registry = collect([link("f1", resident=digests | {"nameless"})], names)

    labels = {"model_name": "llama", "adapter_name": "other", "level": "gpu"}
    assert registry.get_sample_value("vllm:lora_adapter_loaded", labels) == 6
    assert registry.get_sample_value("vllm:num_gpu_loaded_lora_adapters", {"model_name": "llama"}) == len(digests) + 1
